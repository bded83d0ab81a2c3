  // A text whose tokens are shaded by the share of heads that hold their rows.

  // Heads that hold each token at the present moment: of one layer, or of all together.
  function countsOf(run, layer, moment) {
    const layers = run.held[moment], length = run.length[moment];
    const chosen = layer === 0 ? layers.map(function (_, i) { return i; }) : [layer - 1];
    const counts = new Array(length).fill(0);
    let most = 0;
    for (const i of chosen) {
      most += run.heads[i];
      for (let t = 0; t < length; t += 1) counts[t] += layers[i] === null ? run.heads[i] : layers[i][t];
    }
    return { counts: counts, most: most };
  }

  // Layers in which any head holds a token: "1-4, 9".
  function layersOf(run, token, moment) {
    const found = [];
    run.held[moment].forEach(function (row, i) {
      if (row !== null && row[token] === 0) return;
      const last = found[found.length - 1];
      if (last && last[1] === i) last[1] = i + 1; else found.push([i + 1, i + 1]);
    });
    const count = found.reduce(function (sum, part) { return sum + part[1] - part[0] + 1; }, 0);
    const parts = found.map(function (part) { return part[0] === part[1] ? part[0] : part[0] + "–" + part[1]; });
    return { count: count, text: parts.join(", ") };
  }

  function described(panel, token, found) {
    const run = panel.run, moment = axes[1].at, spelled = JSON.stringify(panel.pieces[token]);
    const where = layersOf(run, token, moment);
    const head = "Token " + (token + 1) + ", " + spelled + ": held by " + found.counts[token] + " of " + found.most;
    if (axes[0].at > 0) return head + " heads of " + axes[0].labels[axes[0].at] + ".";
    return head + " heads, in " + where.count + " of " + run.heads.length + " layers"
      + (where.count ? ": " + where.text : "") + ".";
  }

  function paint(panel) {
    const found = countsOf(panel.run, axes[0].at, axes[1].at);
    let rows = 0;
    panel.spans.forEach(function (span, t) {
      const there = t < found.counts.length;
      span.hidden = !there;
      if (!there) return;
      rows += found.counts[t];
      span.style.setProperty("--share", (found.counts[t] / found.most).toFixed(3));
      span.classList.toggle("none", found.counts[t] === 0);
      span.classList.toggle("at", t === panel.at);
    });
    const all = found.most * found.counts.length;
    panel.count.textContent = rows.toLocaleString("en") + " of " + all.toLocaleString("en") + " rows ("
      + Math.round(100 * rows / all) + " %)";
    const text = panel.at >= 0 && panel.at < found.counts.length ? described(panel, panel.at, found) : "";
    if (panel.group.textContent !== text) panel.group.textContent = text;
  }

  function point(panel, token) {
    if (panel.at === token) return;
    panel.at = token;
    paint(panel);
  }

  function walk(panel, event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 }[event.key];
    const last = panel.run.length[axes[1].at] - 1;
    if (step) {
      point(panel, panel.at < 0 ? 0 : Math.min(last, Math.max(0, panel.at + step)));
      panel.spans[panel.at].scrollIntoView({ block: "nearest" });
    } else if (event.key === "Escape") {
      point(panel, -1);
    } else if (!turns(event)) {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  document.querySelectorAll(".text").forEach(function (box) {
    const run = data.runs[Number(box.dataset.method)], figure = box.closest("figure");
    const pieces = data.pieces.concat(run.said);
    const panel = {
      run: run, pieces: pieces, at: -1, count: figure.querySelector(".count"), group: figure.querySelector(".group"),
      spans: pieces.map(function (piece, t) {
        const span = document.createElement("span");
        span.textContent = piece;
        span.classList.toggle("said", t >= data.pieces.length);
        span.addEventListener("pointerenter", function () { point(panel, t); });
        span.addEventListener("pointerdown", function () { point(panel, t); });
        box.append(span);
        return span;
      })
    };
    box.addEventListener("pointerleave", function (event) {
      if (event.pointerType === "mouse") point(panel, -1);
    });
    box.addEventListener("keydown", function (event) { walk(panel, event); });
    painters.push(function () { paint(panel); });
  });
  show();
