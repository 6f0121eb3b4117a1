// Shows /openapi.json and sends requests to this node. No library, and nothing from elsewhere:
// the page works on a machine without a network. Text goes in by textContent only.
"use strict";

const at = (id) => document.getElementById(id);

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") element.className = value;
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

let spec;

function resolve(schema) {
  if (!schema || !schema.$ref) return schema || {};
  return spec.components.schemas[schema.$ref.split("/").pop()];
}

function typeText(schema) {
  if (!schema) return "any";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(typeText).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.type === "array") return `list of ${typeText(schema.items)}`;
  if (schema.type === "object" && schema.additionalProperties && schema.additionalProperties !== true)
    return `object of ${typeText(schema.additionalProperties)}`;
  const bounds = [
    ["minimum", "≥"], ["maximum", "≤"], ["minLength", "length ≥"], ["maxLength", "length ≤"],
  ].filter(([name]) => schema[name] !== undefined).map(([name, sign]) => `${sign} ${schema[name]}`);
  return [schema.type || "any", ...bounds].join(" ");
}

function meaning(schema) {
  const parts = [];
  const own = schema.description || (schema.anyOf || []).map((part) => part.description).find(Boolean);
  if (own) parts.push(own);
  if (schema.default !== undefined && schema.default !== null)
    parts.push(`Default: ${JSON.stringify(schema.default)}.`);
  return parts.join(" ");
}

function referenced(schema) {
  if (!schema || typeof schema !== "object") return [];
  if (schema.$ref) return [schema.$ref.split("/").pop()];
  return Object.values(schema).flatMap(referenced);
}

// A table of the fields of a type, followed by the types that stand in them.
function schemaView(schema, seen = new Set()) {
  const box = make("div");
  const name = schema.$ref ? schema.$ref.split("/").pop() : "";
  if (name) {
    if (seen.has(name)) return box;
    seen.add(name);
  }
  const target = resolve(schema);
  if (!target.properties) {
    box.append(make("code", {}, typeText(target)));
  } else {
    if (target.description) box.append(make("small", {}, target.description));
    box.append(make("table", {}, ...Object.entries(target.properties).map(([field, type]) =>
      make("tr", {},
        make("td", {}, field, (target.required || []).includes(field) ? " *" : ""),
        make("td", { class: "soft" }, typeText(type)),
        make("td", {}, meaning(type))))));
  }
  for (const inner of referenced(target.properties || target.items || target.anyOf)) {
    if (seen.has(inner)) continue;
    box.append(make("h4", {}, inner), schemaView({ $ref: `#/components/schemas/${inner}` }, seen));
  }
  return box;
}

function tryIt(method, path, operation) {
  const inputs = (operation.parameters || []).map((parameter) => ({
    parameter,
    input: make("input", {
      placeholder: typeText(parameter.schema || parameter.content?.["application/json"].schema),
      ariaLabel: parameter.name,
    }),
  }));
  const content = operation.requestBody?.content["application/json"];
  const body = content && make("textarea", {
    rows: 9, spellcheck: false, value: JSON.stringify(content.example || {}, null, 2), ariaLabel: "body",
  });
  const result = make("div");
  const button = make("button", { type: "button" }, "Send");
  button.onclick = async () => {
    let target = path;
    const query = new URLSearchParams();
    const headers = {};
    for (const { parameter, input } of inputs) {
      if (parameter.in === "path") target = target.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
      else if (input.value && parameter.in === "query") query.set(parameter.name, input.value);
      else if (input.value) headers[parameter.name] = input.value;
    }
    if (query.size) target += `?${query}`;
    if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
    if (body) headers["Content-Type"] = "application/json";
    result.replaceChildren(make("small", {}, "…"));
    const started = performance.now();
    try {
      const answer = await fetch(target, { method, headers, body: body ? body.value : undefined });
      const text = await answer.text();
      const ms = (performance.now() - started).toFixed(1);
      let shown = text;
      try { shown = JSON.stringify(JSON.parse(text), null, 2); } catch { /* not JSON: as it is */ }
      result.replaceChildren(
        make("b", { class: answer.ok ? "ok" : "error" }, `${answer.status} `),
        make("small", {}, `${ms} ms · ${[...answer.headers].map(([n, v]) => `${n}: ${v}`).join(" · ")}`),
        make("pre", {}, shown));
    } catch (error) {
      result.replaceChildren(make("p", { class: "error" }, String(error)));
    }
  };
  const curl = make("button", { type: "button" }, "Copy as curl");
  curl.onclick = () => {
    const parts = [`curl -X ${method} '${location.origin}${path}'`];
    if (at("key").value) parts.push(`-H 'Authorization: Bearer <key>'`);
    if (body) parts.push(`-H 'Content-Type: application/json'`, `-d '${body.value.replaceAll("'", "'\\''")}'`);
    navigator.clipboard?.writeText(parts.join(" \\\n  "));
    curl.textContent = "Copied";
    setTimeout(() => { curl.textContent = "Copy as curl"; }, 1500);
  };
  return make("div", {},
    make("h4", {}, "Try it"),
    inputs.length ? make("table", {}, ...inputs.map(({ parameter, input }) =>
      make("tr", {}, make("td", {}, parameter.name), make("td", {}, input)))) : null,
    body, button, curl, result);
}

function operationView(method, path, operation) {
  const box = make("div");
  if (operation.description) box.append(make("p", {}, operation.description));
  if (operation.parameters?.length) {
    box.append(make("h4", {}, "Parameters and headers"), make("table", {}, ...operation.parameters.map((p) => {
      const schema = p.schema || p.content["application/json"].schema;
      return make("tr", {},
        make("td", {}, p.name, p.required ? " *" : ""),
        make("td", { class: "soft" }, `${p.in}, ${typeText(schema)}`),
        make("td", {}, [p.description, meaning(schema)].filter(Boolean).join(" ")));
    })));
  }
  const body = operation.requestBody?.content["application/json"];
  if (body) box.append(make("h4", {}, "Body"), schemaView(body.schema));
  box.append(make("h4", {}, "Answers"));
  for (const [status, response] of Object.entries(operation.responses)) {
    const schema = Object.values(response.content || {})[0]?.schema;
    const isGood = status < 400;
    const line = make("summary", {}, make("b", { class: isGood ? "ok" : "error" }, status), ` ${response.description}`);
    box.append(isGood && schema
      ? make("details", {}, line, schemaView(schema))
      : make("p", {}, ...line.childNodes));
  }
  box.append(tryIt(method, path, operation));
  return box;
}

function show() {
  at("version").textContent = spec.info.version;
  const groups = new Map(spec.tags.map((tag) => [tag.name, []]));
  for (const [path, methods] of Object.entries(spec.paths))
    for (const [method, operation] of Object.entries(methods))
      groups.get(operation.tags[0]).push([method.toUpperCase(), path, operation]);
  const contents = make("div");
  const operations = [];
  for (const tag of spec.tags) {
    contents.append(make("b", {}, tag.name));
    operations.push(make("h2", {}, tag.name), make("small", {}, tag.description));
    for (const [method, path, operation] of groups.get(tag.name)) {
      const entry = make("details", { class: "operation", id: operation.operationId },
        make("summary", {},
          make("span", { class: `method ${method}` }, method),
          make("span", { class: "path" }, path),
          make("span", { class: "soft" }, operation.summary)));
      entry.addEventListener("toggle", () => {
        if (entry.open && entry.children.length === 1) entry.append(operationView(method, path, operation));
      });
      operations.push(entry);
      contents.append(make("a", { href: `#${operation.operationId}` }, operation.summary));
    }
  }
  at("contents").append(contents);
  at("operations").replaceChildren(make("p", {}, spec.info.description), ...operations);
  openHash();
}

function openHash() {
  const entry = location.hash && at(location.hash.slice(1));
  if (entry) { entry.open = true; entry.scrollIntoView(); }
}

window.addEventListener("hashchange", openHash);
fetch("/openapi.json")
  .then((answer) => answer.json())
  .then((document_) => { spec = document_; show(); })
  .catch((error) => { at("state").textContent = `The API's description cannot be loaded: ${error}`; });
