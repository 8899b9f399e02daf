"""What every test of the suite shares."""

from hypothesis import HealthCheck, settings

# Slow machines must not fail a property for the time its inputs take.
settings.register_profile("suite", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
