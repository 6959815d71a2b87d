"""The cloud as a server, and what edges need to reach it."""
