//! [`super::top_k`] on a device, by candle's tensors: scores of many rows with a block of columns are sorted where they
//! are, and only the best of each block leave the device.

use candle_core::{Device, Tensor};

use super::Best;
use crate::Error;

/// Columns of a block: as many as the threads of a GPU's block sort well.
const COLUMNS: usize = 1024;
/// Scores that are there at once: 128 MiB, and as much for their places.
const SCORES: usize = 1 << 25;

/// As [`super::top_k`]: for each of the rows in `rows` (`[n, dim]`) its `k` best others.
///
/// # Errors
/// The device fails, or its memory is too small.
pub fn top_k(device: &Device, rows: &[f32], dim: usize, k: usize) -> Result<Vec<Vec<(u32, f32)>>, Error> {
    in_blocks(device, rows, dim, k, COLUMNS, SCORES / COLUMNS)
}

fn in_blocks(
    device: &Device,
    rows: &[f32],
    dim: usize,
    k: usize,
    columns: usize,
    rows_at_once: usize,
) -> Result<Vec<Vec<(u32, f32)>>, Error> {
    let n = rows.len() / dim;
    let all = Tensor::from_slice(rows, (n, dim), device)?;
    let mut best: Vec<Best> = (0..n).map(|_| Best::new(k)).collect();
    for (part, best) in best.chunks_mut(rows_at_once).enumerate() {
        let first_row = part * rows_at_once;
        let queries = all.narrow(0, first_row, best.len())?;
        for first in (0..n).step_by(columns) {
            let count = columns.min(n - first);
            let scores = queries.matmul(&all.narrow(0, first, count)?.t()?)?;
            // One more: no row is its own neighbour.
            let kept = (k + 1).min(count);
            let places = scores.arg_sort_last_dim(false)?.narrow(1, 0, kept)?.contiguous()?;
            let scores: Vec<f32> = scores.gather(&places, 1)?.flatten_all()?.to_vec1()?;
            let places: Vec<u32> = places.flatten_all()?.to_vec1()?;
            let of_rows = places.chunks_exact(kept).zip(scores.chunks_exact(kept));
            for ((row, best), (places, scores)) in (first_row..).zip(best.iter_mut()).zip(of_rows) {
                for (place, score) in places.iter().zip(scores) {
                    let other = first + *place as usize;
                    if other != row {
                        best.offer(other as u32, *score);
                    }
                }
            }
        }
    }
    Ok(best.into_iter().map(Best::into_sorted).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_any_size_give_the_neighbours_of_the_cpu() {
        let value = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32 - 0.5;
        let rows: Vec<f32> = (0..90 * 8).map(value).collect();
        for k in [1, 7, 100] {
            let wanted = super::super::top_k(&rows, 8, k);
            for (columns, rows_at_once) in [(7, 11), (64, 90), (1024, 1024)] {
                let found = in_blocks(&Device::Cpu, &rows, 8, k, columns, rows_at_once).unwrap();
                for (found, wanted) in found.iter().zip(&wanted) {
                    let ids = |list: &[(u32, f32)]| list.iter().map(|(id, _)| *id).collect::<Vec<_>>();
                    assert_eq!(ids(found), ids(wanted), "{k}, {columns} × {rows_at_once}");
                    assert!(found.iter().zip(wanted).all(|(a, b)| (a.1 - b.1).abs() < 1e-6));
                }
            }
        }
        assert!(in_blocks(&Device::Cpu, &[], 8, 3, 7, 11).unwrap().is_empty());
    }
}
