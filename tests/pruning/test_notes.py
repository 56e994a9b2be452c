from spamprune.pruning.notes import grouped


def test_alike_notes_become_one_in_the_order_of_the_first():
    notes = [
        "blocks.0.fc: at its minimum, 1 of 2 units",
        "stem: 8 channels left whole: a reason: with a colon",
        "blocks.1.fc: at its minimum, 1 of 2 units",
        "macs: 0.4812 is the nearest step below 0.5",
    ]
    assert grouped(notes) == [
        "blocks.*.fc (2 layers): at its minimum, 1 of 2 units",
        "stem: 8 channels left whole: a reason: with a colon",
        "macs: 0.4812 is the nearest step below 0.5",
    ]


def test_only_a_few_names_are_shown():
    names = "abcde"
    assert grouped(f"{name}: why" for name in names) == ["a, b, c, … (5 layers): why"]
