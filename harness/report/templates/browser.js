(function () {
  "use strict";
  var holder = document.getElementById("completions-data");
  var list = document.getElementById("completions-list");
  if (!holder || !list) return;
  var data = JSON.parse(holder.textContent);
  if (!data.rows.length) return;
  var PAGE = 20;
  var rows = data.rows.map(function (row) {
    var text = row[0] + "\n" + row[1] + "\n" + row[2].map(function (a) { return a[0]; }).join("\n");
    return { row: row, text: text.toLowerCase() };
  });
  var found = rows, page = 0;

  function make(tag, name, text) {
    var element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // Filters: what a row must be. `n` is the place of an arm; the base is the first.
  var filters = { all: function () { return true; } };
  var choice = document.getElementById("completions-filter");
  function offer(name, title, test) {
    filters[name] = test;
    var option = make("option", "", title);
    option.value = name;
    choice.appendChild(option);
  }
  function score(row, n) { return row[2][n][2]; }
  var trained = data.arms.map(function (arm, n) { return n; }).filter(function (n) { return data.arms[n][0] !== "sft"; });
  if (trained.length > 1) {
    var one = trained[0], two = trained[1];
    offer("differ", "the arms' scores differ", function (row) { return score(row, one) !== score(row, two); });
    offer("one", data.arms[one][2] + " scores higher", function (row) { return score(row, one) > score(row, two); });
    offer("two", data.arms[two][2] + " scores higher", function (row) { return score(row, two) > score(row, one); });
  }
  data.arms.forEach(function (arm, n) {
    offer("failed" + n, arm[2] + " fails a check", function (row) { return row[2][n][4].length > 0; });
  });
  offer("flagged", "an answer is flagged", function (row) { return row[2].some(function (a) { return a[3].length > 0; }); });

  function card(item, number) {
    var article = make("article");
    var heading = make("h3", "", "Prompt " + number + " ");
    heading.appendChild(make("code", "", item.row[0]));
    article.appendChild(heading);
    article.appendChild(make("p", "prompt", item.row[1]));
    var answers = make("div", "answers");
    item.row[2].forEach(function (answer, n) {
      var arm = data.arms[n], box = make("div", "arm-" + arm[0]), head = make("p", "head"), chip = make("span", "arm");
      var glyph = make("span", "", arm[1]);
      glyph.setAttribute("aria-hidden", "true");
      chip.appendChild(glyph);
      chip.appendChild(document.createTextNode(" " + arm[2]));
      head.appendChild(chip);
      head.appendChild(make("span", "score", "score " + answer[1]));
      box.appendChild(head);
      var notes = answer[3].concat(answer[4].map(function (check) { return "fails " + check; }));
      if (notes.length) {
        var flags = make("p", "flags");
        notes.forEach(function (note) { flags.appendChild(make("span", "flag", note)); flags.appendChild(document.createTextNode(" ")); });
        box.appendChild(flags);
      }
      var text = make("p", "answer", answer[0]);
      text.setAttribute("dir", "auto");
      box.appendChild(text);
      answers.appendChild(box);
    });
    article.appendChild(answers);
    return article;
  }

  var search = document.getElementById("completions-search");
  var count = document.getElementById("completions-count");
  var back = document.getElementById("completions-back"), next = document.getElementById("completions-next");
  function show() {
    var fragment = document.createDocumentFragment();
    var start = page * PAGE;
    found.slice(start, start + PAGE).forEach(function (item, n) { fragment.appendChild(card(item, start + n + 1)); });
    list.replaceChildren(fragment);
    var end = Math.min(start + PAGE, found.length);
    count.textContent = found.length
      ? "Prompts " + (start + 1) + " to " + end + " of " + found.length.toLocaleString("en") + (found.length < rows.length ? " found in " + rows.length.toLocaleString("en") : "")
      : "No prompt is like that.";
    back.disabled = page === 0;
    next.disabled = end >= found.length;
  }
  function update() {
    var words = search.value.toLowerCase().split(/\s+/).filter(Boolean), test = filters[choice.value];
    found = rows.filter(function (item) {
      return test(item.row) && words.every(function (word) { return item.text.indexOf(word) >= 0; });
    });
    page = 0;
    show();
  }
  function turn(by) {
    page += by;
    show();
    document.getElementById("completions").scrollIntoView();
  }
  search.addEventListener("input", update);
  choice.addEventListener("change", update);
  back.addEventListener("click", function () { turn(-1); });
  next.addEventListener("click", function () { turn(1); });
  document.getElementById("completions-tools").hidden = false;
  document.getElementById("completions-static").hidden = true;
  show();
})();
