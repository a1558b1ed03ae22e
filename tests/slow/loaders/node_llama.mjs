// Greedy continuations by node-llama-cpp: node node_llama.mjs FOLDER-OF-node_modules MODEL.gguf '["a prompt"]'

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, modelPath, prompts] = process.argv.slice(2);
const installed = createRequire(pathToFileURL(`${folder}/`)).resolve("node-llama-cpp");
const { getLlama } = await import(pathToFileURL(installed));
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const context = await model.createContext({ contextSize: 256, threads: 1 });
const answers = [];
for (const prompt of JSON.parse(prompts)) {
  const ids = model.tokenize(prompt, true); // marks like <|im_start|> are tokens
  const sequence = context.getSequence();
  const continued = [];
  for await (const token of sequence.evaluate(ids, { temperature: 0 })) {
    continued.push(token);
    if (continued.length >= 12) break;
  }
  sequence.dispose();
  answers.push({ ids, continued });
}
console.log(JSON.stringify(answers));
await llama.dispose();
