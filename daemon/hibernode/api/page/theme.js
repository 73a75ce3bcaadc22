// Light, dark, or what the system says. In the head and before the first paint, so that nothing flashes.

const KEY = "hibernode.theme";
const THEMES = ["auto", "light", "dark"];

function remembered() {
  try {
    const found = localStorage.getItem(KEY);
    return THEMES.includes(found) ? found : "auto";
  } catch { // storage may be forbidden: the page works without
    return "auto";
  }
}

function show(theme) {
  if (theme === "auto") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.dataset.theme = theme;
}

let theme = remembered();
show(theme);

export function bindTheme(button) {
  const say = () => { button.textContent = `Theme: ${theme}`; };
  say();
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try { localStorage.setItem(KEY, theme); } catch { /* as above */ }
    show(theme);
    say();
  });
}
