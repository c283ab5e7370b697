//! Exact top-k over dense rows, for encoders that embed.
//!
//! Rows are compared in blocks that fit the cache. A dot product is summed in one fixed order, whatever the block,
//! so results do not depend on the number of threads.

use rayon::prelude::*;

use super::best::Best;

/// Rows of one side that are compared with a block of the other.
const BLOCK: usize = 64;
/// Running sums of a dot product: enough for two of the widest registers.
const LANES: usize = 32;

/// For each of the rows in `rows` (`[n, dim]`, row-major, of unit length where cosine is meant), the `k` other rows
/// with the largest dot product, best first, equal ones in order of index. Runs on the current rayon pool.
pub fn top_k(rows: &[f32], dim: usize, k: usize) -> Vec<Vec<(u32, f32)>> {
    if dim == 0 {
        return Vec::new();
    }
    rows.par_chunks(BLOCK * dim)
        .enumerate()
        .flat_map_iter(|(block, queries)| {
            let mut best: Vec<Best> = queries.chunks_exact(dim).map(|_| Best::new(k)).collect();
            for (other_block, others) in rows.chunks(BLOCK * dim).enumerate() {
                for (q, (query, best)) in queries.chunks_exact(dim).zip(&mut best).enumerate() {
                    for (o, other) in others.chunks_exact(dim).enumerate() {
                        let index = other_block * BLOCK + o;
                        if index != block * BLOCK + q {
                            best.offer(index as u32, dot(query, other));
                        }
                    }
                }
            }
            best.into_iter().map(Best::into_sorted)
        })
        .collect()
}

/// The dot product of two rows of one length, summed over fixed lanes.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0] + rest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn equals_comparing_all_pairs(n in 1usize..150, dim in 1usize..70, k in 0usize..8, seed in 0u32..1000) {
            let rows: Vec<f32> = (0..n * dim)
                .map(|i| f32::from(((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed * 97) >> 28) as u8) - 7.0)
                .collect();
            let got = top_k(&rows, dim, k);
            for (i, got) in got.iter().enumerate() {
                let row = |i: usize| &rows[i * dim..(i + 1) * dim];
                // Small whole numbers: every order of summation gives the same.
                let mut all: Vec<(u32, f32)> = (0..n)
                    .filter(|j| *j != i)
                    .map(|j| (j as u32, row(i).iter().zip(row(j)).map(|(a, b)| a * b).sum()))
                    .collect();
                all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap());
                all.truncate(k);
                prop_assert_eq!(got, &all);
            }
        }
    }

    #[test]
    fn no_rows_and_no_columns() {
        assert!(top_k(&[], 3, 5).is_empty());
        assert!(top_k(&[], 0, 5).is_empty());
        assert_eq!(top_k(&[1.0, 2.0], 2, 5), [vec![]]);
    }
}
