"""From a guess to queued copies: how much of it is fetched, whether that pays, and how good it was."""
