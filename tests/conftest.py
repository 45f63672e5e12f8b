"""Settings of the whole suite."""

from hypothesis import HealthCheck, settings

# Two busy cores make any single example slow now and then; invariants are checked, not speed.
settings.register_profile("unclip", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unclip")
