"""Rewards for answers that can be checked."""

from mama_trl.evaluation.rewards import accuracy, last_number


def test_accuracy_reads_the_final_answer():
    answers = ["3 + 4 = 7\n#### 7", "#### 1,200", "18", "yes", "0.5"]
    said = ["so it is 7.", "that makes $1,200.00", r"\boxed{18} and 3", "yes", "#### .50"]
    assert accuracy(completions=said, answer=answers) == [1.0] * 5
    wrong = ["7 or 8", "120", r"18 \boxed{3}", "no", ""]
    assert accuracy(completions=wrong, answer=answers) == [0.0] * 5
    messages = [[{"role": "assistant", "content": "It is 7"}]]
    assert accuracy(completions=messages, answer=["#### 7"]) == [1.0]


def test_last_number():
    assert [str(last_number(t)) for t in ("-3", "x", "1,000 and 2.50", "$4")] == ["-3", "None", "2.50", "4"]
