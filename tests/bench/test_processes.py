import signal
import sys

import pytest

from moebius_bench.measure.processes import Sensors, run_worker
from moebius_bench.measure.worker_job import Job

JOB = Job(kind="rate", runtime="ort-cpu")


def run(script, sensors=None):
    return run_worker(JOB, sensors or Sensors(), [sys.executable, "-c", script])


def test_an_answer_comes_back():
    script = "import json,sys; job=json.load(sys.stdin); print(json.dumps({'ok':True,'result':{'kind':job['kind']}}))"
    answer = run(script)
    assert (answer.result, answer.error) == ({"kind": "rate"}, None)


def test_a_refusal_comes_back_in_its_own_words():
    answer = run("""print('{"ok": false, "error": "there is no bundle"}')""")
    assert (answer.result, answer.error) == (None, "there is no bundle")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import sys; sys.stderr.write('first\\nlast words\\n'); sys.exit(3)", ["exit code 3", "last words"]),
        ("raise RuntimeError('broken')", ["exit code 1", "RuntimeError: broken"]),
        ("import os; os.kill(os.getpid(), 9)", ["SIGKILL", "memory runs out"]),
        ("print('not json')", ["no result"]),
        ("print('[1]')", ["no result"]),
        ("print('{\"ok\": true}')", ["no result"]),
        ('import sys; print(\'{"ok": true, "result": {}}\'); sys.exit(1)', ["exit code 1"]),
    ],
)
def test_a_crash_is_reported_with_its_last_words(script, words):
    answer = run(script)
    assert answer.result is None
    for word in words:
        assert word in answer.error


def test_sensors_are_read_while_the_worker_runs():
    memory = iter([5, 9, 7, *[1] * 100])
    sensors = Sensors(lambda: 12.5, "test", lambda pid: next(memory))
    answer = run('import time; time.sleep(0.9); print(\'{"ok": true, "result": {}}\')', sensors)
    assert len(answer.samples) >= 3
    assert {watts for _, watts in answer.samples} == {12.5}
    assert answer.peak_device_memory == 9


def test_an_interrupt_ends_the_worker():
    script = "import time; time.sleep(60)"

    class AlarmError(Exception):
        pass

    def raise_it(number, frame):
        raise AlarmError

    before = signal.signal(signal.SIGALRM, raise_it)  # noqa: TID251
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)  # noqa: TID251
        with pytest.raises(AlarmError):
            run(script)  # comes back after half a second, not after a minute
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # noqa: TID251
        signal.signal(signal.SIGALRM, before)  # noqa: TID251
