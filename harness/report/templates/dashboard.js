(function () {
  "use strict";
  var table = document.getElementById("table");
  if (!table) return;
  var body = table.tBodies[0], rows = Array.prototype.slice.call(body.rows);
  var facts = JSON.parse(document.getElementById("facts").textContent);
  var search = document.getElementById("search"), state = document.getElementById("state");
  var STATE = 5;

  function make(tag, text) {
    var element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    return element;
  }
  function key(row, column) { return row.cells[column].getAttribute("data-key"); }

  // Sorting: numbers by size, all else as text; what is missing comes last either way.
  var order = { column: -1, up: true };
  function sort(column) {
    order = { column: column, up: order.column === column ? !order.up : true };
    var sign = order.up ? 1 : -1;
    rows.sort(function (a, b) {
      var one = key(a, column), two = key(b, column);
      if (!one || !two) return one ? -1 : two ? 1 : 0;
      var numbers = !isNaN(one) && !isNaN(two);
      return sign * (numbers ? one - two : one.localeCompare(two));
    });
    rows.forEach(function (row) { body.appendChild(row); });
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (cell, n) {
      cell.setAttribute("aria-sort", n === column ? (order.up ? "ascending" : "descending") : "none");
    });
  }
  Array.prototype.forEach.call(table.tHead.rows[0].cells, function (cell, n) {
    var button = make("button", cell.textContent);
    button.type = "button";
    button.addEventListener("click", function () { sort(n); });
    cell.replaceChildren(button);
  });

  function filter() {
    var words = search.value.toLowerCase().split(/\s+/).filter(Boolean), shown = 0;
    rows.forEach(function (row) {
      var text = row.textContent.toLowerCase();
      var fits = (!state.value || row.cells[STATE].textContent === state.value) && words.every(function (word) { return text.indexOf(word) >= 0; });
      row.hidden = !fits;
      shown += fits;
    });
    document.getElementById("count").textContent = shown === rows.length ? "" : shown + " of " + rows.length + " studies";
  }
  Array.from(new Set(rows.map(function (row) { return row.cells[STATE].textContent; }))).sort().forEach(function (name) {
    var option = make("option", name);
    option.value = name;
    state.appendChild(option);
  });
  search.addEventListener("input", filter);
  state.addEventListener("change", filter);
  document.getElementById("tools").hidden = false;

  // Two studies side by side; what differs is marked.
  var first = document.getElementById("first"), second = document.getElementById("second");
  function compare() {
    var one = facts[first.value], two = facts[second.value], place = document.getElementById("comparison");
    var head = make("tr"), inside = make("tbody");
    ["", one.Study, two.Study].forEach(function (text) { var cell = make("th", text); cell.scope = "col"; head.appendChild(cell); });
    Object.keys(one).slice(1).forEach(function (name) {
      var row = make("tr"), label = make("th", name);
      label.scope = "row";
      row.appendChild(label);
      [one, two].forEach(function (study) { row.appendChild(make("td", study[name])); });
      if (one[name] !== two[name]) { var mark = make("span", "differs"); mark.className = "flag"; label.append(" ", mark); }
      inside.appendChild(row);
    });
    var top = make("thead");
    top.appendChild(head);
    place.replaceChildren(top, inside);
  }
  if (facts.length > 1) {
    [first, second].forEach(function (choice, n) {
      facts.forEach(function (study, i) { var option = make("option", study.Study); option.value = i; choice.appendChild(option); });
      choice.value = n;
      choice.addEventListener("change", compare);
    });
    document.getElementById("compare").hidden = false;
    compare();
  }

  // A live page asks its own server for news.
  function curve(run) {
    var box = make("div"), svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    var line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    var low = Math.min.apply(null, run.losses), high = Math.max.apply(null, run.losses), span = high - low || 1;
    var last = run.total || run.steps[run.steps.length - 1] || 1;
    line.setAttribute("points", run.steps.map(function (step, n) { return (100 * step / last).toFixed(2) + "," + (38 - 36 * (run.losses[n] - low) / span).toFixed(2); }).join(" "));
    svg.setAttribute("viewBox", "0 0 100 40");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "loss from " + run.losses[0].toFixed(3) + " to " + run.losses[run.losses.length - 1].toFixed(3));
    svg.appendChild(line);
    box.appendChild(make("p", run.study + ", " + run.arm + ": step " + run.steps[run.steps.length - 1] + " of " + run.total + ", loss " + run.losses[run.losses.length - 1].toFixed(4)));
    box.appendChild(svg);
    return box;
  }
  function ask() {
    fetch("/news").then(function (answer) { return answer.json(); }).then(function (news) {
      if (news.rows.length !== rows.length) { location.reload(); return; }
      news.rows.forEach(function (study) {
        var row = rows.find(function (one) { return one.getAttribute("data-name") === study.name; });
        if (!row) return;
        study.cells.forEach(function (cell, n) {
          if (n && row.cells[n].textContent !== cell[0]) {
            row.cells[n].textContent = cell[0];
            row.cells[n].setAttribute("data-key", cell[1] === null ? "" : cell[1]);
          }
        });
      });
      document.getElementById("running").hidden = !news.curves.length;
      document.getElementById("curves").replaceChildren.apply(document.getElementById("curves"), news.curves.map(curve));
    }).catch(function () {}).then(function () { setTimeout(ask, 2000); });
  }
  if (document.body.hasAttribute("data-live")) ask();
})();
