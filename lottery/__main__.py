from lottery.cli import app

app(prog_name="lottery")
