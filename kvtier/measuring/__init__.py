"""``kvtier calibrate``: what is measured of a machine, and how."""
