// Runs the script of a page in a document that is just large enough for it, and prints what the page says of every
// patch at every stage: [[[stage][patch]: text] of each method of the first image], and what keys do.
// usage: node viz_page_stub.js page.js data.json
"use strict";
const fs = require("fs");
const vm = require("vm");
const data = JSON.parse(fs.readFileSync(process.argv[3], "utf8"));
const drawn = { fillRect: 0, drawImage: 0 };

class Element {
  constructor(tag) {
    Object.assign(this, { tag: tag, dataset: {}, attributes: {}, listeners: {}, textContent: "", value: "", checked: true });
  }
  addEventListener(kind, heard) { (this.listeners[kind] = this.listeners[kind] || []).push(heard); }
  fire(kind, more) {
    const event = Object.assign({ target: this, preventDefault() {}, stopPropagation() {} }, more);
    (this.listeners[kind] || []).forEach((heard) => heard(event));
  }
  setAttribute(name, value) { this.attributes[name] = value; }
  getBoundingClientRect() { return { left: 10, top: 20, width: 100 * data.grid[1], height: 100 * data.grid[0] }; }
  closest(selector) { return selector === "figure" ? this.figure : selector.split(", ").includes(this.tag) ? this : null; }
  getContext() {
    return new Proxy({}, {
      get: (_, name) => (...parts) => {
        if (name in drawn) drawn[name] += 1;
        if (parts.some((p) => typeof p === "number" && !Number.isFinite(p))) throw new Error(name + " " + parts);
      },
      set: (_, name, value) => {
        if (/undefined|NaN/.test(String(value))) throw new Error(name + " = " + value);
        return true;
      }
    });
  }
}

class Picture extends Element {
  constructor() { super("img"); Object.assign(this, { complete: true, naturalWidth: 40 }); }
}

const byId = { data: new Element("script"), view: new Element("select"), outlines: new Element("input"),
  together: new Element("input") };
byId.data.textContent = JSON.stringify(data);
byId.view.value = "mean";
const sections = data.images.map((image, i) => {
  byId["slider-" + i] = new Element("input");
  byId["slider-" + i].value = data.depth;
  byId["where-" + i] = new Element("span");
  byId["play-" + i] = new Element("button");
  const canvases = image.runs.map((_, m) => {
    const parts = { ".count": new Element("span"), ".group": new Element("p") };
    const canvas = new Element("canvas");
    canvas.dataset.method = String(m);
    canvas.figure = { querySelector: (selector) => parts[selector], parts: parts };
    return canvas;
  });
  return { canvases: canvases, querySelectorAll: () => canvases };
});
const page = new Element("document");
page.getElementById = (id) => byId[id];
page.querySelector = (selector) => sections[Number(selector.match(/\d+/)[0])];
const timers = new Map();
const clock = {
  setInterval: (tick) => { timers.set(timers.size + 1, tick); return timers.size; },
  clearInterval: (id) => { timers.delete(id); }
};
const world = { document: page, Image: Picture, Element: Element, ...clock };
vm.runInNewContext(fs.readFileSync(process.argv[2], "utf8"), world);

const columns = data.grid[1], count = data.grid[0] * columns;
const slider = byId["slider-0"], canvases = sections[0].canvases;
const texts = canvases.map(() => []), counts = canvases.map(() => []);
for (let stage = 0; stage <= data.depth; stage += 1) {
  slider.value = String(stage);
  slider.fire("input");
  canvases.forEach((canvas, m) => { counts[m].push(canvas.figure.parts[".count"].textContent); texts[m].push([]); });
  for (let patch = 0; patch < count; patch += 1) {
    const at = { clientX: 10 + 100 * (patch % columns) + 50, clientY: 20 + 100 * Math.floor(patch / columns) + 50 };
    canvases[0].fire("pointermove", at);
    canvases.forEach((canvas, m) => texts[m][stage].push(canvas.figure.parts[".group"].textContent));
  }
}
canvases[0].fire("pointerleave", { pointerType: "mouse" });
const left = canvases[0].figure.parts[".group"].textContent;
for (const value of ["groups", "image"]) {
  byId.view.value = value;
  byId.view.fire("change");
}
const keys = [];
const note = () => keys.push([byId["where-0"].textContent, canvases[0].figure.parts[".group"].textContent]);
page.fire("keydown", { key: "ArrowLeft", target: new Element("body") });
note();
page.fire("keydown", { key: "ArrowRight", target: slider });  // the slider's own business
note();
canvases[0].fire("keydown", { key: "PageDown" });
note();
for (const key of ["ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowLeft"]) {
  canvases[0].fire("keydown", { key: key });
}
note();
canvases[0].fire("keydown", { key: "Escape" });
note();
const others = data.images.map((_, i) => byId["where-" + i].textContent);
byId.together.checked = false;
slider.value = "0";
slider.fire("input");
others.push(...data.images.map((_, i) => byId["where-" + i].textContent));
// Played from the first stage to the last, where it stops by itself.
const played = [];
byId["play-0"].fire("click");
for (let i = 0; i < 9 && timers.size; i += 1) {
  timers.forEach((tick) => tick());
  played.push(byId["where-0"].textContent);
}
console.log(JSON.stringify({ texts: texts, counts: counts, left: left, keys: keys, others: others, played: played, drawn: drawn }));
