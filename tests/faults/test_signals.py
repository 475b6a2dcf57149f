"""A run that signals stop, in whatever it is doing, says so, and the same command ends it as if none had come."""

import pathlib
import re
import signal
import subprocess
import sys
import time
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM

import pytest
from disturbed import STEPS, Disturbance, make_workplace, outcome, train
