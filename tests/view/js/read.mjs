// Reads arrays of a store over HTTP with zarrita and prints them as JSON: node read.mjs URL PATH...
import * as zarr from "zarrita";

const [url, ...paths] = process.argv.slice(2);
const root = zarr.root(new zarr.FetchStore(url));
const found = {};
for (const path of paths) {
  const array = await zarr.open.v3(root.resolve(path), { kind: "array" });
  const { data, shape } = await zarr.get(array);
  const values = Array.from(data, (value) => (typeof value === "bigint" ? Number(value) : value));
  found[path] = { dtype: array.dtype, shape, values: values.map((v) => (Number.isNaN(v) ? null : v)) };
}
console.log(JSON.stringify(found));
