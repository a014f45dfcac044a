"""The health of a run: the norms of every layer in every step, alarms and actions; Jacobian norms on request."""

from distopt.health.alarms import Alarm
from distopt.health.depth import Trend
from distopt.health.jacobian import Gains, jacobian_gains
from distopt.health.monitor import Monitor
from distopt.optim.observer import StepNorms

__all__ = ["Alarm", "Gains", "Monitor", "StepNorms", "Trend", "jacobian_gains"]
