"""``atomeq select``: from a pool of structures to those worth labelling."""

import dataclasses

from ase.calculators.singlepoint import SinglePointCalculator
from jsonargparse import Namespace

from atomeq.cli.structures import structure_output, write_summary
from atomeq.cli.terminal import Meter, say, show_table
from atomeq.cli.verbs import load, settings
from atomeq.data.ase_files import read_structures
from atomeq.screening.selection import select


def choose(options: Namespace) -> int:
    """Choose, write the structures and tell why these."""
    calculator = load(options.potential, options)
    pool, places = [], []
    for file in options.pool:
        for frame, atoms in enumerate(read_structures(file)):
            pool.append(atoms)
            places.append(f"{file}#{frame}")
    training = [atoms for file in options.train for atoms in read_structures(file)]
    meter = Meter("select", len(pool), unit="structures")
    with meter.running():
        found = select(
            pool,
            options.number,
            calculator.potential,
            by=options.by.replace("-", "_"),
            training=training,
            seed=options.seed,
            observe=meter.advance,
        )
    rows = [
        {"rank": rank, "locator": places[one.index], **dataclasses.asdict(one)}
        for rank, one in enumerate(found.chosen)
    ]
    with structure_output(options.out) as output:
        for one in found.chosen:
            atoms = pool[one.index]
            labels = atoms.calc.results if atoms.calc is not None else {}
            atoms.calc = SinglePointCalculator(atoms, **labels) if labels else None
            atoms.info["id"] = one.id
            output.write(atoms)
    copies = [{"locator": places[k], "copy_of": which} for k, which in sorted(found.copies.items())]
    summary = write_summary(
        "select",
        options.out,
        source=", ".join(options.pool),
        calculator=calculator,
        settings={k: v for k, v in settings(options).items() if k != "pool"},
        results={"n_pool": len(pool), "unit": found.unit, "chosen": rows, "copies": copies},
    )
    shown = [
        [str(row["rank"]), row["id"][:12], f"{row['score']:.4g}", row["locator"]] for row in rows
    ]
    show_table(["rank", "id", f"score, {found.unit}", "where"], shown)
    say(f"{len(rows)} of {len(pool)} structures, {len(copies)} copies left out")
    say(f"wrote {options.out} and {summary}")
    return 0
