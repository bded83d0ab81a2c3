"""The parts of ``tokred app``: one setting tried on one picture, as numbers, as HTML, and as a page of Gradio's."""
