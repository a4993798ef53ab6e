"""A page to write on, token by token, beside an agent. Begin with ``desk``; ``page`` shows it."""
