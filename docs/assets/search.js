// The theme's search, changed in three ways. A reader gets results in the language of the page. The
// dashes of --ent-coef are no NOT. And what belongs together must be found together: the parts of
// ent_coef or --ent-coef, and the characters of a Chinese word. The index has each of them by
// itself (`separator` in mkdocs.yml), so that one finds the other, and the title "The clipped
// surrogate" is that of clipped_surrogate.
// The address of this file has the language and the theme's own script, from docs/hooks.py.

"use strict";
const given = new URLSearchParams(location.search);
const SETUP = 0, QUERY = 2, RESULT = 3; // what a message is
const TOGETHER = /\p{sc=Han}+|[a-z0-9]*(?:[-_]+[a-z0-9]+)+/giu;
let phrases = [];

const language_of = (doc) => (/^zh\/|\.zh\./.test(doc.location) ? "zh" : "en");
const parts = (phrase) => phrase.match(/\p{sc=Han}|[a-z0-9]+/giu);
const plain = (text) => text.replace(/<[^>]+>/g, "").replace(/[-_\s]+/g, " ").toLowerCase();

addEventListener("message", ({ data: message }) => {
  if (message.type === SETUP) {
    const { docs } = message.data;
    message.data.docs = docs.filter((doc) => language_of(doc) === given.get("language"));
  } else if (message.type === QUERY) {
    const query = message.data;
    phrases = (query.match(TOGETHER) ?? []).map((phrase) => plain(phrase).trim());
    message.data = query
      .replace(TOGETHER, (phrase) => ` +${parts(phrase).join(" +")}* `) // + is AND
      .replace(/(^|\s)-+/g, "$1")
      .replace(/:/g, " "); // name: would search a field of that name
  }
});

/** Keep the sections of each page that have all phrases; the page itself heads them. */
function with_phrases(sections) {
  const has = ({ title, text }, phrase) => plain(`${title} ${text}`).includes(phrase);
  const found = sections.filter((x) => phrases.every((phrase) => has(x, phrase)));
  const page = sections.find((x) => !x.parent);
  return found.length && page && !found.includes(page) ? [...found, page] : found;
}

const post = self.postMessage.bind(self);
self.postMessage = (message) => {
  if (message.type === RESULT && phrases.length) {
    const { items } = message.data;
    const found = items.map(with_phrases).filter((sections) => sections.length);
    // Recipes have every name in their patches; other pages explain it.
    const is_recipe = ([section]) => section.location.includes("/copying.");
    message.data.items = found.sort((a, b) => is_recipe(a) - is_recipe(b));
  }
  post(message);
};

importScripts(given.get("theme"));
