// Next-token logits of llama.cpp, by node-llama-cpp, on the CPU with one thread.
//
//   node logits.mjs REQUEST.json
//
// REQUEST.json: {library: node_modules/node-llama-cpp, model: FILE.gguf, adapters: [FILE.gguf or null, …],
// prompts: [[token id, …], …], out: FILE}. `out` gets little-endian float32: for every adapter (null: none) and every
// token of every prompt in turn, the logits of the whole vocabulary.
import {readFileSync, writeFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const request = JSON.parse(readFileSync(process.argv[2], "utf8"));
const {getLlama} = await import(pathToFileURL(join(request.library, "dist", "index.js")).href);
const llama = await getLlama({
    gpu: false, build: "never", usePrebuiltBinaries: true, skipDownload: true, maxThreads: 1, progressLogs: false,
});
const model = await llama.loadModel({modelPath: request.model, gpuLayers: 0});
const rows = [];
for (const adapter of request.adapters) {
    // Keys and values in full precision: what differs from PEFT is then the adapter, or rounding.
    const context = await model.createContext({
        contextSize: 256, threads: 1, flashAttention: false,
        experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
        ...(adapter ? {lora: adapter} : {}),
    });
    const sequence = context.getSequence();
    for (const prompt of request.prompts) {
        await sequence.clearHistory();
        const answers = await sequence.controlledEvaluate(
            prompt.map((token) => [token, {generateNext: {logits: true}}]),
        );
        for (const {next} of answers) {
            const row = new Float32Array(next.logits.size);
            for (const [token, logit] of next.logits) row[token] = logit;
            rows.push(Buffer.from(row.buffer));
        }
    }
    await context.dispose();
}
writeFileSync(request.out, Buffer.concat(rows));
await llama.dispose();
