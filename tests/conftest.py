"""Of all suites."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No example has a time limit of its own: on a busy machine a process may stand still for longer than the usual one, 0.2 s.
settings.register_profile("hibernode", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hibernode")
