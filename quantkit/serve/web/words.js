// Which words two answers do not share.

const MAX_CELLS = 4_000_000; // of the table: 2,000 words against as many

export const words = (text) => text.match(/\S+/g) ?? [];

// For both lists, whether each word lies outside their longest common subsequence; null if the
// table would be too large. Equal beginnings and ends need no table.
export function differing(left, right) {
  let start = 0;
  let [leftEnd, rightEnd] = [left.length, right.length];
  while (start < leftEnd && start < rightEnd && left[start] === right[start]) start++;
  while (leftEnd > start && rightEnd > start && left[leftEnd - 1] === right[rightEnd - 1]) {
    leftEnd--;
    rightEnd--;
  }
  const a = left.slice(start, leftEnd);
  const b = right.slice(start, rightEnd);
  if (a.length * b.length > MAX_CELLS) return null;

  const width = b.length + 1;
  const common = new Uint16Array((a.length + 1) * width); // of what is left from (i, j) on
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const [below, beside] = [common[(i + 1) * width + j], common[i * width + j + 1]];
      const both = common[(i + 1) * width + j + 1] + 1;
      common[i * width + j] = a[i] === b[j] ? both : Math.max(below, beside);
    }
  }

  const differs = [left, right].map((list) => list.map(() => false));
  differs[0].fill(true, start, leftEnd);
  differs[1].fill(true, start, rightEnd);
  let [i, j] = [0, 0];
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) differs[0][start + i++] = differs[1][start + j++] = false;
    else if (common[(i + 1) * width + j] >= common[i * width + j + 1]) i++;
    else j++;
  }
  return differs;
}
