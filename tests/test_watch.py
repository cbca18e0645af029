"""x"""
import json
import train
from test_train import arguments, TOKENS

def test_a(tiny, tmp_path, capsys):
    train.main(arguments(tiny, tmp_path, *TOKENS, "2", "--max_steps", "4", "--eval_data_path", str(tiny.manifest), "--eval_strategy", "steps", "--eval_steps", "1", "--predict_with_generate",
    "--metric_for_best_model", "wer", "--load_best_model_at_end", "--save_steps", "1"))
    print(capsys.readouterr())
    print((tmp_path/"log.jsonl").read_text())
    print((tmp_path/"README.md").read_text())
    print(list(tmp_path.iterdir()))
    import shutil; shutil.copy(tmp_path/"curve.png", "/tmp/w/curve.png")
    assert 0
