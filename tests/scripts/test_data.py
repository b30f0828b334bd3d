"""Datasets of the training commands."""

from mama_trl.scripts import data


def test_with_prompts():
    from datasets import Dataset

    rows = Dataset.from_dict({"question": ["1+1?"], "answer": ["#### 2"]})
    assert data.with_prompts(rows, None, False, True)[0] == {"prompt": "1+1?", "completion": " #### 2"}
    templated = data.with_prompts(rows, "Q: {question}\n", False, False)[0]
    assert templated["prompt"] == "Q: 1+1?\n" and templated["answer"] == "#### 2"
    chat = data.with_prompts(rows, None, True, True)[0]
    assert chat["prompt"] == [{"role": "user", "content": "1+1?"}]
    assert chat["completion"] == [{"role": "assistant", "content": "#### 2"}]
    text = Dataset.from_dict({"text": ["a"]})
    assert data.with_prompts(text, None, False, True) is text
