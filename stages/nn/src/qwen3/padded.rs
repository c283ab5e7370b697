//! Attention on a device for all prompts of a batch together: queries are laid out as rectangles, so that the number of
//! kernels does not grow with the number of prompts. What is padding is hidden from all, or nobody's.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use candle_nn::ops::softmax_last_dim;

use super::{
    Config,
    kv::{Extent, LayerKv},
    store::{Owned, Rectangle, Store},
};
use crate::Error;

/// Scores that are computed together.
pub const SCORES_AT_ONCE: usize = 1 << 25;
/// Added to the scores of what must not be seen: its probability is 0, and a row that sees nothing is not NaN.
const HIDDEN: f32 = -1e30;

type Result<T> = std::result::Result<T, Error>;

/// Attention of a model's heads.
pub struct Attention {
    device: Device,
    dtype: DType,
    kv_heads: usize,
    /// Query heads that share a head of keys and values.
    group: usize,
    head_dim: usize,
    /// It bounds the memory.
    pub scores_at_once: usize,
}

/// How a batch attends, alike in all layers.
pub struct Plan {
    blocks: Vec<Block>,
    /// Where the result of each row stands among those of all blocks.
    places: Tensor,
}

/// Queries that are computed together.
struct Block {
    queries: Rectangle,
    /// Columns of the store that are looked at.
    seen: usize,
    /// `[1 or prompts, 1, width, prefix + seen]`: 0 where a query may look, [`HIDDEN`] where not.
    mask: Tensor,
}

/// The blocks of a plan so far.
struct Planner<'a> {
    device: &'a Device,
    blocks: Vec<Block>,
    places: Vec<u32>,
    results: u32,
}

impl Planner<'_> {
    fn add(&mut self, first: usize, rows: &[Range<usize>], seen: usize, mask: Tensor) -> Result<()> {
        let queries = Rectangle::new(first, rows, self.device)?;
        for (prompt, rows) in rows.iter().enumerate() {
            let start = self.results as usize + prompt * queries.width;
            rows.clone().zip(start..).for_each(|(row, place)| self.places[row] = place as u32);
        }
        self.results += (queries.prompts * queries.width) as u32;
        self.blocks.push(Block { queries, seen, mask });
        Ok(())
    }

    /// The plan, of which the results of `wanted` rows are looked at.
    fn finish(self, wanted: impl Iterator<Item = usize>) -> Result<Plan> {
        let places: Vec<u32> = wanted.map(|row| self.places[row]).collect();
        let count = places.len();
        Ok(Plan { blocks: self.blocks, places: Tensor::from_vec(places, count, self.device)? })
    }
}

impl Attention {
    pub fn new(config: &Config, device: &Device, dtype: DType) -> Self {
        let Config { kv_heads, head_dim, .. } = *config;
        let (device, scores_at_once) = (device.clone(), SCORES_AT_ONCE);
        Self { device, dtype, kv_heads, group: config.group(), head_dim, scores_at_once }
    }

    fn planner(&self, rows: usize) -> Planner<'_> {
        Planner { device: &self.device, blocks: Vec::new(), places: vec![0; rows], results: 0 }
    }

    /// Prompts behind a prefix of `before` tokens (the longest prompt first): every token sees the prefix and what is not
    /// behind itself. What is padding is behind every token.
    ///
    /// # Errors
    /// The device's memory is too small.
    pub fn of_prompts(&self, before: usize, owned: &Owned) -> Result<Plan> {
        let longest = owned.rows.first().map_or(0, Range::len);
        let count = owned.rows.iter().map(Range::len).sum();
        let mut plan = self.planner(count);
        let mut start = 0;
        while start < longest {
            let going = owned.rows.partition_point(|rows| rows.len() > start);
            let width = self.fitting(going * (before + longest)).min(longest - start);
            let part = |rows: &Range<usize>| rows.start + start..rows.end.min(rows.start + start + width);
            let rows: Vec<_> = owned.rows[..going].iter().map(part).collect();
            let seen = start + width;
            let visible = |position: usize| before + position + 1;
            let mask = self.mask((1, 1, width, before + seen), (start..seen).map(visible))?;
            plan.add(owned.first, &rows, seen, mask)?;
            start = seen;
        }
        plan.finish(0..count)
    }

    /// Of the same prompts the last tokens alone; `last` are their rows, in the order of results.
    ///
    /// # Errors
    /// The device's memory is too small.
    pub fn of_last(&self, before: usize, owned: &Owned, last: &[usize]) -> Result<Plan> {
        let longest = owned.rows.first().map_or(0, Range::len);
        let mut plan = self.planner(owned.rows.iter().map(Range::len).sum());
        let rows: Vec<_> = owned.rows.iter().map(|rows| rows.end - 1..rows.end).collect();
        let visible = owned.rows.iter().map(|rows| before + rows.len());
        let mask = self.mask((rows.len(), 1, 1, before + longest), visible)?;
        plan.add(owned.first, &rows, longest, mask)?;
        plan.finish(last.iter().copied())
    }

    /// Beams behind a prefix of `before` tokens: every token sees the prefix, its prompt, the slots of its path and itself.
    ///
    /// # Errors
    /// The device's memory is too small.
    pub fn of_beams(&self, before: usize, store: &Store, owned: &Owned, paths: &[&[Vec<u32>]]) -> Result<Plan> {
        let extents = store.extents(owned.first, owned.rows.len());
        let slots = owned.rows.iter().zip(extents).map(|(rows, extent)| extent.slots + rows.len()).max().unwrap_or(0);
        let width = owned.rows.iter().map(Range::len).max().unwrap_or(0);
        let (prompt, seen) = (before + store.longest(), store.longest() + slots);
        let count = owned.rows.iter().map(Range::len).sum();
        let mut plan = self.planner(count);
        let at_once = self.fitting(width * (before + seen)).min(owned.rows.len());
        for start in (0..owned.rows.len()).step_by(at_once) {
            let part = start..(start + at_once).min(owned.rows.len());
            let (rows, extents) = (&owned.rows[part.clone()], &extents[part.clone()]);
            let width = rows.iter().map(Range::len).max().unwrap_or(0);
            if width == 0 {
                continue;
            }
            let visible = extents.iter().map(|extent| before + extent.length);
            let of_prompts = self.mask((rows.len(), 1, 1, prompt), visible)?;
            let of_prompts = of_prompts.broadcast_as((rows.len(), 1, width, prompt))?.contiguous()?;
            let of_slots = self.mask_of_paths(&paths[part], extents, (width, slots))?;
            plan.add(owned.first + start, rows, seen, Tensor::cat(&[of_prompts, of_slots], 3)?)?;
        }
        plan.finish(0..count)
    }

    /// How often so many scores of a head fit into what is computed together, and at least once.
    fn fitting(&self, scores: usize) -> usize {
        (self.scores_at_once / (self.kv_heads * self.group * scores)).max(1)
    }

    /// A mask whose rows show as many columns, from the first on, as `visible` says of each.
    fn mask(&self, shape: (usize, usize, usize, usize), visible: impl Iterator<Item = usize>) -> Result<Tensor> {
        let row = |visible| (0..shape.3).map(move |column| if column < visible { 0.0 } else { HIDDEN });
        let mask: Vec<f32> = visible.flat_map(row).collect();
        Ok(Tensor::from_vec(mask, shape, &self.device)?)
    }

    /// `[prompts, 1, width, slots]`: each token sees the slots of its path and its own.
    fn mask_of_paths(&self, paths: &[&[Vec<u32>]], extents: &[Extent], shape: (usize, usize)) -> Result<Tensor> {
        let (width, slots) = shape;
        let mut mask = vec![HIDDEN; paths.len() * width * slots];
        for ((mask, paths), extent) in mask.chunks_exact_mut(width * slots).zip(paths).zip(extents) {
            for ((row, path), own) in mask.chunks_exact_mut(slots).zip(*paths).zip(extent.slots..) {
                path.iter().for_each(|slot| row[*slot as usize] = 0.0);
                row[own] = 0.0;
            }
        }
        Ok(Tensor::from_vec(mask, (paths.len(), 1, width, slots), &self.device)?)
    }

    /// The attention of queries `[rows, heads, head_dim]` over what stands before all prompts (`[kv_heads, length,
    /// head_dim]`) and over the store's keys and values; `[wanted rows, heads × head_dim]`.
    ///
    /// # Errors
    /// The device fails.
    pub fn over(&self, plan: &Plan, queries: &Tensor, prefix: Option<&LayerKv>, kv: &LayerKv) -> Result<Tensor> {
        let of_block = |block: &Block| -> Result<Tensor> {
            let Rectangle { first, prompts, .. } = block.queries;
            let seen = |all: &Tensor| all.narrow(0, first, prompts)?.narrow(2, 0, block.seen);
            let own = LayerKv { keys: seen(&kv.keys)?, values: seen(&kv.values)? };
            let probabilities = self.probabilities(block, queries, prefix, &own)?;
            self.weigh(block, &probabilities, prefix, &own)
        };
        let results = plan.blocks.iter().map(of_block).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&results, 0)?.index_select(&plan.places, 0)?)
    }

    /// `[prompts, kv_heads, group × width, prefix + seen]`.
    fn probabilities(
        &self,
        block: &Block,
        queries: &Tensor,
        prefix: Option<&LayerKv>,
        own: &LayerKv,
    ) -> Result<Tensor> {
        let Rectangle { prompts, width, .. } = block.queries;
        let rows = self.group * width;
        // Query heads that share a head of keys and values are neighbours, and become rows of one product.
        let queries = block.queries.of(queries)?;
        let queries = queries.reshape((prompts, width, self.kv_heads, self.group, self.head_dim))?;
        let queries = queries.permute((0, 2, 3, 1, 4))?.contiguous()?;
        let queries = queries.reshape((prompts, self.kv_heads, rows, self.head_dim))?;
        let queries = (queries * (1.0 / (self.head_dim as f64).sqrt()))?;
        let mut scores = queries.matmul(&own.keys.t()?)?;
        if let Some(prefix) = prefix {
            // All prompts' queries are rows of one product.
            let queries = by_kv_head(&queries)?;
            let shared = by_prompt(&queries.matmul(&prefix.keys.t()?)?, prompts)?.contiguous()?;
            scores = Tensor::cat(&[shared, scores], 3)?;
        }
        let length = scores.dim(3)?;
        let scores = scores.to_dtype(DType::F32)?.reshape((prompts, self.kv_heads * self.group, width, length))?;
        let probabilities = softmax_last_dim(&scores.broadcast_add(&block.mask)?)?.to_dtype(self.dtype)?;
        Ok(probabilities.reshape((prompts, self.kv_heads, rows, length))?)
    }

    /// The sum of values; `[prompts × width, heads × head_dim]`.
    fn weigh(&self, block: &Block, probabilities: &Tensor, prefix: Option<&LayerKv>, own: &LayerKv) -> Result<Tensor> {
        let Rectangle { prompts, width, .. } = block.queries;
        let before = probabilities.dim(3)? - block.seen;
        let mut out = probabilities.narrow(3, before, block.seen)?.contiguous()?.matmul(&own.values)?;
        if let Some(prefix) = prefix {
            let shared = by_kv_head(&probabilities.narrow(3, 0, before)?)?.matmul(&prefix.values)?;
            out = (out + by_prompt(&shared, prompts)?)?;
        }
        let out = out.reshape((prompts, self.kv_heads, self.group, width, self.head_dim))?;
        let out = out.permute((0, 3, 1, 2, 4))?.contiguous()?;
        Ok(out.reshape((prompts * width, self.kv_heads * self.group * self.head_dim))?)
    }
}

/// From `[prompts, kv_heads, rows, n]` to `[kv_heads, prompts × rows, n]`.
fn by_kv_head(x: &Tensor) -> Result<Tensor> {
    let (prompts, kv_heads, rows, n) = x.dims4()?;
    Ok(x.transpose(0, 1)?.contiguous()?.reshape((kv_heads, prompts * rows, n))?)
}

/// Back, as a view.
fn by_prompt(x: &Tensor, prompts: usize) -> Result<Tensor> {
    let (kv_heads, rows, n) = x.dims3()?;
    Ok(x.reshape((kv_heads, prompts, rows / prompts, n))?.transpose(0, 1)?)
}
