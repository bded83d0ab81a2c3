  // Pictures under a grid of tokens: those that are gone are dark and struck through, those that became one share a
  // colour and an outline. The grid may be another one at every place.
  const LONG = 560;
  const view = document.getElementById("view");
  const outlines = document.getElementById("outlines");

  // The map of a panel at the present place: groups by token (-1: gone), and how many tokens each group has.
  function mapOf(panel) {
    const index = panel.at[place()];
    return index === null ? null : maps[index];
  }

  const maps = data.maps.map(function (found) {
    const groups = found.groups || Array.from(found.kept, function (kept, token) { return kept === "1" ? token : -1; });
    const sizes = new Array(groups.length).fill(0);
    for (const group of groups) {
      if (group >= 0) sizes[group] += 1;
    }
    return { rows: found.grid[0], columns: found.grid[1], groups: groups, sizes: sizes };
  });

  function colourOf(group) {
    const hue = (0.12 + group * 0.618034) % 1;
    return "hsl(" + Math.round(360 * hue) + " 90% " + [50, 62, 42][group % 3] + "%)";
  }

  // Where the cells of a map begin, in whole pixels, so that neighbours leave no gap.
  function boxOf(canvas, map, token) {
    const row = Math.floor(token / map.columns), column = token % map.columns;
    const x = Math.round(column * canvas.width / map.columns), y = Math.round(row * canvas.height / map.rows);
    return {
      row: row, column: column, x: x, y: y, width: Math.round((column + 1) * canvas.width / map.columns) - x,
      height: Math.round((row + 1) * canvas.height / map.rows) - y
    };
  }

  // The mean colour of each group, from the picture at one pixel a token.
  function fillsOf(panel, map) {
    const small = document.createElement("canvas");
    small.width = map.columns;
    small.height = map.rows;
    const context = small.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(panel.picture, 0, 0, map.columns, map.rows);
    const pixels = context.getImageData(0, 0, map.columns, map.rows).data;
    const sums = new Array(3 * map.groups.length).fill(0);
    map.groups.forEach(function (group, token) {
      if (group < 0) return;
      for (let c = 0; c < 3; c += 1) sums[3 * group + c] += pixels[4 * token + c];
    });
    return map.sizes.map(function (size, group) {
      const mean = [0, 1, 2].map(function (c) { return Math.round(sums[3 * group + c] / Math.max(size, 1)); });
      return "rgb(" + mean.join(" ") + ")";
    });
  }

  // Strips along every side and corner where the neighbour belongs to another group.
  function edge(panel, map, groups, token, width) {
    const box = boxOf(panel.canvas, map, token), context = panel.context;
    for (let dy = -1; dy <= 1; dy += 1) {
      for (let dx = -1; dx <= 1; dx += 1) {
        const y = box.row + dy, x = box.column + dx;
        const inside = y >= 0 && y < map.rows && x >= 0 && x < map.columns;
        if (inside && groups[y * map.columns + x] === groups[token]) continue;
        context.fillRect(
          box.x + (dx > 0 ? box.width - width : 0), box.y + (dy > 0 ? box.height - width : 0),
          dx === 0 ? box.width : width, dy === 0 ? box.height : width
        );
      }
    }
  }

  function strike(context, box) {
    context.fillStyle = "rgba(0, 0, 0, 0.75)";
    context.fillRect(box.x, box.y, box.width, box.height);
    context.strokeStyle = "rgba(255, 255, 255, 0.4)";
    context.lineWidth = Math.max(1, box.width / 18);
    context.beginPath();
    context.moveTo(box.x, box.y);
    context.lineTo(box.x + box.width, box.y + box.height);
    context.stroke();
  }

  function fill(panel, map) {
    const shown = view ? view.value : "image", context = panel.context;
    const fills = shown === "mean" ? fillsOf(panel, map) : [];
    map.groups.forEach(function (group, token) {
      const box = boxOf(panel.canvas, map, token);
      if (group < 0) {
        strike(context, box);
        return;
      }
      if (shown === "mean" && map.sizes[group] > 1) {
        context.fillStyle = fills[group];
        context.fillRect(box.x, box.y, box.width, box.height);
      } else if (shown === "groups" && map.sizes[group] > 1) {
        context.globalAlpha = 0.7;
        context.fillStyle = colourOf(group);
        context.fillRect(box.x, box.y, box.width, box.height);
        context.globalAlpha = 1;
      }
      if (outlines && outlines.checked && map.sizes[group] > 1) {
        context.fillStyle = colourOf(group);
        edge(panel, map, map.groups, token, Math.max(1, Math.floor(Math.min(box.width, box.height) / 8)));
      }
    });
  }

  function highlight(panel, map) {
    const group = map.groups[panel.token], context = panel.context;
    const chosen = function (token) { return group < 0 ? token === panel.token : map.groups[token] === group; };
    // A token that is gone has no group: it is outlined alone.
    const marked = group < 0 ? map.groups.map(function (_, token) { return token; }) : map.groups;
    for (const stroke of [["#000000", 4], ["#ffffff", 2]]) {
      context.fillStyle = stroke[0];
      map.groups.forEach(function (_, token) {
        if (chosen(token)) edge(panel, map, marked, token, stroke[1]);
      });
    }
  }

  function named(map, token) {
    return "row " + (Math.floor(token / map.columns) + 1) + ", column " + (token % map.columns + 1);
  }

  function described(panel, map) {
    const group = map.groups[panel.token], here = "Token at " + named(map, panel.token) + ": ";
    if (group < 0) {
      if (axes.length > 1) return here + (data.merges ? "left out here." : "gone.");
      const first = panel.at.findIndex(function (index) {
        return index !== null && maps[index].groups[panel.token] < 0;
      });
      return here + "gone from " + axes[0].labels[first] + " on.";
    }
    if (map.sizes[group] === 1) return here + (data.merges ? "a token of its own." : "stays.");
    const where = group === panel.token ? "this very token" : "the token at " + named(map, group);
    return here + "one of " + map.sizes[group] + " that are computed as one, in the place of " + where + ".";
  }

  function paint(panel) {
    const map = mapOf(panel), canvas = panel.canvas;
    panel.context.clearRect(0, 0, canvas.width, canvas.height);
    if (!panel.picture.complete || !panel.picture.naturalWidth) return;
    panel.context.drawImage(panel.picture, 0, 0, canvas.width, canvas.height);
    if (map === null) {
      panel.told = "";
      return;
    }
    fill(panel, map);
    if (panel.token >= map.groups.length) panel.token = -1;
    if (panel.token >= 0) highlight(panel, map);
    panel.told = panel.token >= 0 ? described(panel, map) : "";
  }

  function write(figure) {
    figure.count.textContent = figure.notes[place()];
    const text = figure.panels.map(function (panel) { return panel.told; }).find(Boolean) || "";
    if (figure.group.textContent !== text) figure.group.textContent = text;
  }

  // One token is shown at a time, in all pictures that have the same grid.
  function point(panel, token) {
    if (panel.token === token) return;
    for (const other of panel.figure.panels) other.token = other === panel ? token : -1;
    panel.figure.panels.forEach(paint);
    write(panel.figure);
  }

  function tokenAt(panel, event) {
    const map = mapOf(panel), box = panel.canvas.getBoundingClientRect();
    if (map === null) return -1;
    const column = Math.floor((event.clientX - box.left) / box.width * map.columns);
    const row = Math.floor((event.clientY - box.top) / box.height * map.rows);
    return column >= 0 && column < map.columns && row >= 0 && row < map.rows ? row * map.columns + column : -1;
  }

  function walk(panel, event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const map = mapOf(panel), step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key in step && map !== null) {
      const row = Math.floor(panel.token / map.columns) + step[event.key][0];
      const column = panel.token % map.columns + step[event.key][1];
      const inside = row >= 0 && row < map.rows && column >= 0 && column < map.columns;
      point(panel, panel.token < 0 ? 0 : inside ? row * map.columns + column : panel.token);
    } else if (event.key === "Escape") {
      point(panel, -1);
    } else if (!turns(event)) {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  function panelOf(canvas, figure) {
    const found = data.panels[Number(canvas.dataset.panel)];
    const scale = LONG / Math.max(found.shape[0], found.shape[1]);
    canvas.height = Math.round(scale * found.shape[0]);
    canvas.width = Math.round(scale * found.shape[1]);
    const panel = {
      canvas: canvas, context: canvas.getContext("2d"), figure: figure, at: found.at, token: -1, told: "",
      picture: new Image()
    };
    canvas.addEventListener("pointermove", function (event) { point(panel, tokenAt(panel, event)); });
    canvas.addEventListener("pointerdown", function (event) { point(panel, tokenAt(panel, event)); });
    canvas.addEventListener("pointerleave", function (event) {
      if (event.pointerType === "mouse") point(panel, -1);
    });
    canvas.addEventListener("keydown", function (event) { walk(panel, event); });
    panel.picture.addEventListener("load", function () { paint(panel); });
    panel.picture.src = data.pictures[found.picture];
    return panel;
  }

  document.querySelectorAll("figure[data-figure]").forEach(function (element) {
    const figure = {
      notes: data.notes[Number(element.dataset.figure)], count: element.querySelector(".count"),
      group: element.querySelector(".group")
    };
    figure.panels = Array.from(element.querySelectorAll("canvas"), function (canvas) { return panelOf(canvas, figure); });
    painters.push(function () {
      figure.panels.forEach(paint);
      write(figure);
    });
  });
  for (const control of [view, outlines]) {
    if (control) control.addEventListener("change", show);
  }
  show();
