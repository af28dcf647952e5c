"""Runs all checks on a combination, and prints the table."""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from ..backends import default_backend
from ..finetune.config import Arguments
from ..finetune.errors import SetupError
from ..integrations.transformers import NAME
from ..provenance import provenance
from .checks import FAIL, Row, run_checks
from .combination import Combination, combine
from .stack import Stack
