"""Rules, alerts and dashboards as code. `python deploy/generate.py` writes the files that are deployed."""
