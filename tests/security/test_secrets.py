"""Keys in the environment are in no file and no line of a run."""

import subprocess

SECRETS = {
    "WANDB_API_KEY": "5ecre7" * 6 + "5ec1",  # 40 characters, as theirs
    "HF_TOKEN": "hf_verysecretverysecretverysecret",
    "AWS_SECRET_ACCESS_KEY": "aws/verysecret/verysecret/verysecret/ver",
    "OPENAI_API_KEY": "sk-verysecretverysecretverysecret",
}


def test_a_run_leaves_no_key_behind(root, data, tmp_path, command, environment):
    done = subprocess.run(
        command(data, tmp_path, "a", "samples_seen=96", "tracking=default"),
        cwd=root,
        env=environment() | SECRETS,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files) and len(files) > 5
    for name, secret in SECRETS.items():
        for text in (secret.encode(), secret.encode()[4:-4]):
            assert text not in done.stdout + done.stderr, name
            found = [path for path in files if text in path.read_bytes()]
            assert not found, (name, found)
