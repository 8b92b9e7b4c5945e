"""The laws of any calculator and any model, written once: measured here, repaired elsewhere."""
