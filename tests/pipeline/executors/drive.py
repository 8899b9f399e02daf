"""A driver in a process of its own, for tests that send signals: ``python -m tests.pipeline.executors.drive JSON``."""

import json
import sys

from manifests.errors import FactoryError
from manifests.storage import Storage
from pipeline.events import EventLog
from pipeline.executors.driver import execute
from pipeline.executors.pool import WorkerSpec
from pipeline.executors.settings import ExecutorSettings
from pipeline.lease import Lease


def main() -> int:
    job = json.loads(sys.argv[1])
    storage = Storage(job["storage"])
    if "ray" in job:  # a cluster that claims to have such resources
        import ray

        ray.init("local", include_dashboard=False, log_to_driver=False, **job["ray"])
    events = EventLog(storage)
    spec = WorkerSpec("tests.pipeline.executors.faulty:build_faulty", job["spec"] | {"storage": job["storage"]})
    try:
        with Lease(storage, events.write, beat_every=0.2, stale_after=1.0) as lease:
            settings = ExecutorSettings(**job["settings"])
            execute(spec, range(job["shards"]), settings, events, storage, lease=lease).check()
    except FactoryError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
