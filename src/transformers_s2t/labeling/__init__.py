"""How labels are made: rollouts, decision points, and teachers in this process or behind a server."""
