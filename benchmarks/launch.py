"""``launch.py FILE COMMAND...``: run it and write [seconds, CPU seconds, peak bytes] to FILE.

A process of its own: on Linux the peak memory of a process begins with that of the one that
started it, and the judge is large.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    started = time.perf_counter()
    process = subprocess.Popen(sys.argv[2:])
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    Path(sys.argv[1]).write_text(json.dumps([seconds, used.ru_utime + used.ru_stime, peak]))
    process.returncode = os.waitstatus_to_exitcode(status)
    sys.exit(process.returncode if process.returncode >= 0 else 128 - process.returncode)
