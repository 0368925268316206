"""Trainers of the GDSO teacher and the RISD student."""
