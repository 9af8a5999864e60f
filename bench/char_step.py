"""A whole training step of a character model in fastseq and in PyTorch: first the same numbers, then time and memory.

Checked and timed as by ``fastseq bench``: each engine in its own process, stopped (SIGSTOP) except while it is timed.
Memory is the peak of a process that imports one engine, builds the model and takes some steps.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import character

from fastseq import threads
from fastseq.bench import UsageError, engines
from fastseq.bench.cases import ITEM
from fastseq.bench.cases.recurrent import Recurrent
from fastseq.bench.report import as_json
from fastseq.bench.worker import THREAD_VARIABLES
from fastseq.cli import bench, info
from fastseq.cli.table import size, table
from fastseq.io import write_whole

ENGINES = ("fastseq", "torch")


@dataclass(frozen=True)
class Step(Recurrent):
    """The step as a row of the table. Its limit counts the products and nothing else."""

    @property
    def name(self):
        return f"character step {self.batch}×{self.time}"

    @property
    def outputs(self):
        return 4  # loss, norm, h and c

    @property
    def input_flops(self):
        projection = 2 * self.products * self.batch * self.time * self.hidden * character.SYMBOLS
        return character.LAYERS * super().input_flops + projection

    @property
    def recurrent_flops(self):
        return character.LAYERS * super().recurrent_flops

    @property
    def input_bytes(self):
        return character.LAYERS * super().input_bytes + ITEM * self.hidden * character.SYMBOLS

    @property
    def recurrent_bytes(self):
        return character.LAYERS * super().recurrent_bytes


for _engine in (*ENGINES, "exact"):  # also in the processes of the engines, which import this to read the case
    engines.builders(_engine)[Step] = lambda case, threads, engine=_engine: character.build(engine, threads)

STEP = Step("lstm", character.BATCH, character.TIME, character.HIDDEN, character.HIDDEN, train=True)


def memory(engine, n_threads):
    """Bytes at the peak of a process that takes some steps, and of those what the import took."""
    done = subprocess.run(
        [sys.executable, character.__file__, engine, str(n_threads)],
        env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(n_threads)),
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", metavar="N", help="threads of both engines (default: what fastseq would use)")
    parser.add_argument("--rounds", metavar="N", default="5", help="turns of each engine (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write every number there, whole or not at all")
    options = parser.parse_args()
    try:
        n_threads = info.thread_count()[0]
        if options.threads is not None:
            n_threads = bench.whole_number("--threads", options.threads, threads.MAX_THREADS)
        rounds = bench.whole_number("--rounds", options.rounds, 10_000)
        bench.chosen_engines("torch", [STEP])
        json_file = bench.writable("--json", options.json)
    except UsageError as error:
        parser.error(str(error))

    report = bench.measure([STEP], ["torch"], n_threads, rounds, asked=True)
    if report is None:
        return 1
    print(table(report))
    memories = {engine: memory(engine, n_threads) for engine in ENGINES}
    said = (f"{engine} {size(held['peak'])} (import {size(held['import'])})" for engine, held in memories.items())
    ratio = memories["torch"]["peak"] / memories["fastseq"]["peak"]
    print(f"memory at the peak: {', '.join(said)}; torch holds {ratio:.2f} times as much as fastseq")
    if json_file is not None:
        result = json.loads(as_json(report)) | {"memory": memories}
        write_whole(json_file, (json.dumps(result, indent=2) + "\n").encode())
    return 1 if any(row.faults for row in report.rows) else 0


if __name__ == "__main__":
    # By its own name, under which the processes of the engines find what it defines.
    import char_step

    sys.exit(char_step.main())
