"""What any Atari agent needs: it knows neither the agent's arguments nor an injection."""
