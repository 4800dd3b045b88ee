"""The shell that joins the stations: intake, devices, delivery, life cycle."""
