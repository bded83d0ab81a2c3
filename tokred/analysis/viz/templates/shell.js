  // Sliders over the axes of a recording, with a button that plays each; whoever draws adds a function to `painters`.
  const data = JSON.parse(document.getElementById("data").textContent);
  const painters = [];
  const axes = data.axes.map(function (axis, i) {
    return {
      labels: axis.labels, at: axis.start, timer: 0, slider: document.getElementById("axis-" + i),
      where: document.getElementById("where-" + i), button: document.getElementById("play-" + i)
    };
  });

  // The number of the present place among all, the last axis running fastest.
  function place() {
    return axes.reduce(function (sum, axis) { return sum * axis.labels.length + axis.at; }, 0);
  }

  function show() {
    for (const axis of axes) {
      axis.slider.value = axis.at;
      axis.slider.setAttribute("aria-valuetext", axis.labels[axis.at]);
      axis.where.textContent = axis.labels[axis.at];
    }
    painters.forEach(function (paint) { paint(); });
  }

  function move(axis, to) {
    const next = Math.min(axis.labels.length - 1, Math.max(0, to));
    if (next === axis.at) return;
    axis.at = next;
    show();
  }

  function stop(axis) {
    clearInterval(axis.timer);
    axis.timer = 0;
    axis.button.textContent = "Play";
  }

  function play(axis) {
    if (axis.at === axis.labels.length - 1) move(axis, 0);
    axis.button.textContent = "Stop";
    axis.timer = setInterval(function () {
      move(axis, axis.at + 1);
      if (axis.at === axis.labels.length - 1) stop(axis);
    }, Math.max(120, Math.min(800, 12000 / axis.labels.length)));
  }

  for (const axis of axes) {
    axis.slider.addEventListener("input", function () {
      stop(axis);
      move(axis, Number(axis.slider.value));
    });
    axis.button.addEventListener("click", function () {
      if (axis.timer) stop(axis); else play(axis);
    });
  }

  // Left and right move the first slider, with Shift the second, wherever the focus is not on something that uses them.
  document.addEventListener("keydown", function (event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const busy = event.target instanceof Element && event.target.closest("input, select, canvas, .text");
    if (!step || busy || event.altKey || event.ctrlKey || event.metaKey) return;
    const axis = axes[event.shiftKey ? 1 : 0];
    if (!axis) return;
    stop(axis);
    move(axis, axis.at + step);
    event.preventDefault();
  });

  // Page Up and Page Down on what is drawn move the first slider as well.
  function turns(event) {
    const step = { PageUp: 1, PageDown: -1 }[event.key];
    if (step) move(axes[0], axes[0].at + step);
    return Boolean(step);
  }
