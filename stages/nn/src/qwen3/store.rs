//! Keys and values of a batch on a device: one rectangle for all prompts, padded to the longest, with room behind it for
//! what beams generate. It is written in place, by as many kernels for many prompts as for one.

use std::{cmp::Reverse, ops::Range};

use candle_core::{DType, Device, Tensor};

use super::{
    Config,
    kv::{Extent, LayerKv, Room},
    model::Step,
};
use crate::Error;

/// The number of a row or column that is padding: candle reads zeros there, and writes nothing.
const NOWHERE: u32 = u32::MAX;

/// Prompts on a device.
pub struct Store {
    /// `[prompts, kv_heads, longest + slots, head_dim]` each.
    layers: Vec<LayerKv>,
    /// Where slots begin.
    longest: usize,
    /// In the order of the tensors.
    extents: Vec<Extent>,
    /// Where each prompt stands in the tensors.
    places: Vec<usize>,
}

/// Rows of a batch that belong to neighbours in the store, and which ones are whose.
pub struct Owned {
    pub first: usize,
    /// None of those who do not take part.
    pub rows: Vec<Range<usize>>,
}

/// Rows of a batch as a rectangle, `[prompts, width]`.
pub struct Rectangle {
    pub first: usize,
    pub prompts: usize,
    pub width: usize,
    /// Which row stands where.
    numbers: Tensor,
}

impl Store {
    /// Room for prompts and what is generated for them.
    ///
    /// # Errors
    /// The device's memory is too small.
    pub fn zeros(config: &Config, room: Room, device: &Device, dtype: DType) -> Result<Self, Error> {
        let shape = (room.prompts, config.kv_heads, room.longest + room.slots, config.head_dim);
        let zeros = || Tensor::zeros(shape, dtype, device);
        let layer = || -> Result<LayerKv, Error> { Ok(LayerKv { keys: zeros()?, values: zeros()? }) };
        let layers = (0..config.layers).map(|_| layer()).collect::<Result<_, _>>()?;
        Ok(Self { layers, longest: room.longest, extents: Vec::new(), places: Vec::new() })
    }

    pub fn extent(&self, prompt: usize) -> Extent {
        self.extents[self.places[prompt]]
    }

    /// Of neighbours in the store.
    pub fn extents(&self, first: usize, count: usize) -> &[Extent] {
        &self.extents[first..first + count]
    }

    pub fn longest(&self) -> usize {
        self.longest
    }

    pub fn layer(&self, layer: usize) -> &LayerKv {
        &self.layers[layer]
    }

    /// The first prompt's keys and values alone, `[kv_heads, longest + slots, head_dim]`.
    ///
    /// # Errors
    /// The device fails.
    pub fn into_first(self) -> Result<Vec<LayerKv>, Error> {
        let alone = |tensor: Tensor| tensor.get(0);
        self.layers.into_iter().map(|kv| Ok(LayerKv { keys: alone(kv.keys)?, values: alone(kv.values)? })).collect()
    }

    /// Gives prompts with these rows their places: the longest first, so that those who have tokens from some position on
    /// are neighbours.
    pub fn add(&mut self, rows: &[Range<usize>]) -> Owned {
        let first = self.places.len();
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|which| Reverse(rows[*which].len()));
        self.places.resize(first + rows.len(), 0);
        for (place, which) in (first..).zip(&order) {
            self.places[first + which] = place;
            self.extents.push(Extent { length: rows[*which].len(), slots: 0 });
        }
        Owned { first, rows: order.into_iter().map(|which| rows[which].clone()).collect() }
    }

    /// Whose rows those of `steps` are. Prompts that take no step stay where they are: to compute them in vain costs less
    /// than to copy the others.
    pub fn owned<'p>(&self, steps: &[Step<'p>], rows: &[Range<usize>]) -> (Owned, Vec<&'p [Vec<u32>]>) {
        let places = || steps.iter().map(|step| self.places[step.prompt]);
        let (first, end) = (places().min().unwrap_or(0), places().max().map_or(0, |last| last + 1));
        let mut owned = Owned { first, rows: vec![0..0; end - first] };
        let mut paths: Vec<&[Vec<u32>]> = vec![&[]; end - first];
        for ((place, step), rows) in places().zip(steps).zip(rows) {
            owned.rows[place - first] = rows.clone();
            paths[place - first] = step.paths;
        }
        (owned, paths)
    }

    /// Writes the keys and values (`[rows, kv_heads, head_dim]`) of whole prompts.
    ///
    /// # Errors
    /// There is no room for them; the device fails.
    pub fn write_prompts(&self, layer: usize, at: &Rectangle, new: &LayerKv) -> Result<(), Error> {
        let LayerKv { keys, values } = &self.layers[layer];
        for (all, new) in [(keys, &new.keys), (values, &new.values)] {
            all.narrow(0, at.first, at.prompts)?.slice_set(&at.by_heads(new)?, 2, 0)?;
        }
        Ok(())
    }

    /// Writes the keys and values (`[rows, kv_heads, head_dim]`) of generated tokens to these [`Store::columns`].
    ///
    /// # Errors
    /// The device fails.
    pub fn write_slots(&self, layer: usize, at: &Rectangle, columns: &Tensor, new: &LayerKv) -> Result<(), Error> {
        let LayerKv { keys, values } = &self.layers[layer];
        for (all, new) in [(keys, &new.keys), (values, &new.values)] {
            all.narrow(0, at.first, at.prompts)?.scatter_set(columns, &at.by_heads(new)?, 2)?;
        }
        Ok(())
    }

    /// Where the next slots are, `[prompts, kv_heads, width, head_dim]`; makes room for them.
    ///
    /// # Errors
    /// The device's memory is too small.
    pub fn columns(&mut self, owned: &Owned, at: &Rectangle) -> Result<Tensor, Error> {
        let extents = &self.extents[owned.first..];
        let slots = owned.rows.iter().zip(extents).map(|(rows, extent)| extent.slots + rows.len()).max().unwrap_or(0);
        let next = |(rows, extent): (&Range<usize>, &Extent)| {
            let start = self.longest + extent.slots;
            padded(start..start + rows.len(), at.width)
        };
        let columns: Vec<u32> = owned.rows.iter().zip(extents).flat_map(next).collect();
        self.make_room(slots)?;
        let keys = &self.layers[0].keys;
        let (_, kv_heads, _, head_dim) = keys.dims4()?;
        let columns = Tensor::from_vec(columns, (at.prompts, 1, at.width, 1), keys.device())?;
        Ok(columns.broadcast_as((at.prompts, kv_heads, at.width, head_dim))?.contiguous()?)
    }

    fn make_room(&mut self, slots: usize) -> Result<(), Error> {
        for LayerKv { keys, values } in &mut self.layers {
            let room = keys.dim(2)? - self.longest;
            if slots > room {
                // As many again, so that growing is rare.
                let more = 2 * slots - room;
                *keys = keys.pad_with_zeros(2, 0, more)?;
                *values = values.pad_with_zeros(2, 0, more)?;
            }
        }
        Ok(())
    }

    /// Counts the tokens of `steps` once they are written.
    pub fn count(&mut self, steps: &[Step]) {
        for step in steps {
            self.extents[self.places[step.prompt]].slots += step.tokens.len();
        }
    }
}

impl Rectangle {
    /// # Errors
    /// The device's memory is too small.
    pub fn new(first: usize, rows: &[Range<usize>], device: &Device) -> Result<Self, Error> {
        let width = rows.iter().map(Range::len).max().unwrap_or(0);
        let numbers: Vec<u32> = rows.iter().flat_map(|rows| padded(rows.clone(), width)).collect();
        let numbers = Tensor::from_vec(numbers, rows.len() * width, device)?;
        Ok(Self { first, prompts: rows.len(), width, numbers })
    }

    /// Rows `[rows, heads, head_dim]` in their places, `[prompts, width, heads, head_dim]`.
    ///
    /// # Errors
    /// The device fails.
    pub fn of(&self, rows: &Tensor) -> Result<Tensor, Error> {
        let (_, heads, dim) = rows.dims3()?;
        Ok(rows.index_select(&self.numbers, 0)?.reshape((self.prompts, self.width, heads, dim))?)
    }

    /// The same as `[prompts, heads, width, head_dim]`.
    fn by_heads(&self, rows: &Tensor) -> Result<Tensor, Error> {
        Ok(self.of(rows)?.transpose(1, 2)?.contiguous()?)
    }
}

/// Numbers, and padding behind them up to `width`.
fn padded(numbers: Range<usize>, width: usize) -> impl Iterator<Item = u32> {
    let count = numbers.len();
    numbers.map(|number| number as u32).chain(std::iter::repeat_n(NOWHERE, width - count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qwen3::device_memory;

    #[test]
    fn memory_is_taken_as_stated() {
        let config = Config {
            vocab_size: 9,
            hidden_size: 8,
            intermediate_size: 8,
            layers: 3,
            heads: 4,
            kv_heads: 2,
            head_dim: 4,
            ..Config::default()
        };
        let room = Room { prompts: 5, longest: 7, slots: 6 };
        let store = Store::zeros(&config, room, &Device::Cpu, DType::BF16).unwrap();
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let taken: usize = store.layers.iter().map(|kv| bytes(&kv.keys) + bytes(&kv.values)).sum();
        assert_eq!(taken, 5 * device_memory::tokens(&config, 7 + 6, 2));
    }

    #[test]
    fn the_longest_prompts_come_first() {
        let mut store = Store { layers: Vec::new(), longest: 9, extents: Vec::new(), places: Vec::new() };
        let owned = store.add(&[0..2, 2..7, 7..8]);
        assert_eq!((owned.first, owned.rows), (0, vec![2..7, 0..2, 7..8]));
        let owned = store.add(&[0..3, 3..12]);
        assert_eq!((owned.first, owned.rows), (3, vec![3..12, 0..3]));
        assert_eq!([0, 1, 2, 3, 4].map(|prompt| store.extent(prompt).length), [2, 5, 1, 3, 9]);
        let path = [Vec::new()];
        let step = |prompt| Step { prompt, tokens: &[1], paths: &path };
        let (owned, paths) = store.owned(&[step(0), step(3)], &[0..1, 1..2]);
        assert_eq!((owned.first, owned.rows), (1, vec![0..1, 0..0, 0..0, 1..2]), "with those between them");
        assert_eq!(paths.iter().map(|paths| paths.len()).collect::<Vec<_>>(), [1, 0, 0, 1]);
    }
}
