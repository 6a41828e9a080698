"""What a user sees of a run, from the log alone."""

import json

from vllm_ctc_spec.training.config import TrainConfig
from vllm_ctc_spec.training.forecast import Pace
from vllm_ctc_spec.training.metrics import LOG_NAME, LogFollower, StepBar


def line(step: int, **more: float) -> str:
    return json.dumps({"step": step, "loss_sum": 2.0 * step, "anchors_total": 4, **more}) + "\n"


def pace(steps: int) -> Pace:
    return Pace(TrainConfig("t", "d", steps=steps))


def test_a_follower_reads_each_entry_once_and_all_again_after_a_restart(tmp_path):
    assert LogFollower(tmp_path).last_step == 0
    log = tmp_path / LOG_NAME
    log.write_text(line(1) + line(2))
    follower = LogFollower(tmp_path)
    assert follower.last_step == 2 and follower.new_entries() == []
    with log.open("a") as file:
        file.write(line(3) + line(4)[:9])
    assert [entry["step"] for entry in follower.new_entries()] == [3]
    log.write_text(line(1))
    assert [entry["step"] for entry in follower.new_entries()] == [1]
    with log.open("a") as file:
        file.write("torn}\n" + line(2))
    assert [entry["step"] for entry in follower.new_entries()] == [2]


def test_the_bar_goes_back_with_a_restart_and_repeats_no_line(capsys):
    measured = {"held_out_tokens_total": 30, "held_out_steps_total": 12.0}
    with StepBar(steps=8, first_step=2, pace=pace(8)) as bar:
        shared = {"loss_sum": 6.0, "anchors_total": 4, "seconds": 2.0, "held_out_half_width": 0.25}
        for step, more in ((2, measured), (3, measured), (4, {}), (3, measured), (4, {**measured}), (5, measured)):
            bar.show({"step": step, **shared, **more})
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        f"step {n}: held-out acceptance length 2.500 +- 0.250; about {left} seconds and the measurements to go"
        for n, left in ((3, 10), (5, 6))
    ]
    assert "5/8" in output.err and "loss=1.500" in output.err


def test_a_bar_that_is_switched_off_says_nothing(capsys):
    with StepBar(steps=2, first_step=0, pace=pace(1), disable=True) as bar:
        bar.show({"step": 1, "loss_sum": 6.0, "anchors_total": 4, "seconds": 1.0})
    output = capsys.readouterr()
    assert output.out == output.err == ""
