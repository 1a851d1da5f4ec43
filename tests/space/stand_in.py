"""The smallest app that a visitor can sign in to, for the tests of the fixtures."""

import time

import gradio as gr
from huggingface_hub import whoami


def who(token: gr.OAuthToken | None, profile: gr.OAuthProfile | None) -> str:
    """Say whose token the app was given."""
    if token is None or profile is None:
        return "nobody"
    return f"{profile.username} is {whoami(token.token)['name']}"


def wrong() -> None:
    """Fail in the browser, and ask for something elsewhere."""


def late() -> None:
    """Answer when nobody waits any more."""
    time.sleep(5)


with gr.Blocks(title="stand-in", analytics_enabled=False) as demo:
    gr.LoginButton()
    shown = gr.Textbox(label="Who")
    demo.load(who, outputs=shown)
    gr.Button("Break").click(
        wrong, js="() => { console.error('broken'); fetch('http://example.org/x').catch(() => null); }"
    )
    for number in range(3):
        gr.Button(f"Wait {number}").click(late, concurrency_limit=None)

if __name__ == "__main__":
    demo.launch(footer_links=[])
