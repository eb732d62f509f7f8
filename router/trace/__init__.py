"""Recorded and synthetic choices of the gate, and what a placement would have done with them. Pure: numpy and files."""
