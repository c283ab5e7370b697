//! What LlamaFactory is given to learn from: the samples that this program would learn from, as text, mixed for an
//! epoch; those to validate on; and the description of both files.

use std::{
    borrow::Cow,
    fs,
    io::{BufWriter, Write},
    path::Path,
    slice,
};

use grlm_nn::train::{Corpus, data::Place};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::{fit, settings};
use crate::{
    StageContext, StageError,
    lm::{Layout, Sample},
    train::{data, params::Params, validation},
};

/// Samples to learn from and to validate on.
pub struct Dataset<'a> {
    /// Of every file the samples that have something to learn, none of them too long.
    files: Vec<Vec<Cow<'a, Sample>>>,
    /// An epoch. Unlike this program, LlamaFactory takes the same samples every epoch.
    epoch: Vec<Place>,
    /// What to validate on; empty where nothing was asked for.
    valid: Vec<Sample>,
    /// What became of the samples.
    pub counts: data::Counts,
}

impl<'a> Dataset<'a> {
    /// Counts, reports and refuses as [`data::corpus`] does.
    ///
    /// # Errors
    /// No sample has anything to learn, or none is left to validate on; a stop was asked for.
    pub fn new(
        params: &Params,
        files: &'a [data::File],
        layout: &Layout,
        cx: &mut StageContext,
    ) -> Result<Self, StageError> {
        let (mut corpus, counts) = data::corpus(params, files, layout, cx)?;
        name_places(&mut corpus);
        let mut kept = Vec::with_capacity(files.len());
        for file in files {
            cx.check_stop()?;
            kept.push(learnable(params, &file.samples, layout)?);
        }
        let valid = match cx.optional_input("valid") {
            Some(path) => chosen(params, Sample::read(path)?, layout)?,
            None => {
                let held = validation::share(&params.validation, &mut corpus, params.seed);
                held.iter().map(|named| sample(&kept, place(named)).clone()).collect()
            }
        };
        validation::check_any(&params.validation, valid.is_empty(), cx)?;
        let order = corpus.order(params.seed, 0);
        let epoch: Vec<Place> = order.into_iter().map(|at| place(corpus.get(at))).collect();
        if epoch.is_empty() {
            return Err(StageError::params("an epoch takes no sample")
                .help("raise `weights`, or hold out less: `validation.share`"));
        }
        Ok(Self { files: kept, epoch, valid, counts })
    }

    /// Samples of an epoch.
    pub fn epoch_len(&self) -> usize {
        self.epoch.len()
    }

    pub fn validates(&self) -> bool {
        !self.valid.is_empty()
    }

    /// Writes the samples, and `dataset_info.json`.
    ///
    /// # Errors
    /// The disk is full; a stop was asked for.
    pub fn write(&self, folder: &Path, cx: &StageContext) -> Result<(), StageError> {
        let epoch = self.epoch.iter().map(|&at| sample(&self.files, at));
        write_samples(&folder.join("train.json"), epoch, cx)?;
        if self.validates() {
            write_samples(&folder.join("valid.json"), self.valid.iter(), cx)?;
        }
        let path = folder.join("dataset_info.json");
        fs::write(&path, description(self.validates()).to_string()).map_err(|e| StageError::io("write", path, e))
    }
}

/// Puts the place of every sample where its tokens were: wherever it is moved to or drawn, it can be found again.
fn name_places(corpus: &mut Corpus) {
    for (file, source) in (0..).zip(&mut corpus.sources) {
        for (number, sample) in (0..).zip(&mut source.samples) {
            sample.tokens = vec![file, number];
        }
    }
}

fn place(named: &grlm_nn::train::Sample) -> Place {
    (named.tokens[0], named.tokens[1])
}

fn sample<'s>(files: &'s [Vec<Cow<Sample>>], (file, number): Place) -> &'s Sample {
    &files[file as usize][number as usize]
}

/// The samples that [`data::tokenise`] keeps, in their order, none of them too long.
fn learnable<'a>(params: &Params, samples: &'a [Sample], layout: &Layout) -> Result<Vec<Cow<'a, Sample>>, StageError> {
    let one = |sample: &'a Sample| {
        let (tokens, _) = data::tokenise(params, slice::from_ref(sample), layout)?;
        (!tokens.is_empty()).then(|| fit::fitted(sample, layout)).transpose()
    };
    let all: Vec<Option<_>> = samples.par_iter().map(one).collect::<Result<_, StageError>>()?;
    Ok(all.into_iter().flatten().collect())
}

/// As many samples of the file `valid` as are looked at, chosen by the seed.
fn chosen(params: &Params, mut samples: Vec<Sample>, layout: &Layout) -> Result<Vec<Sample>, StageError> {
    samples.shuffle(&mut ChaCha8Rng::seed_from_u64(params.seed));
    samples.truncate(params.validation.users);
    Ok(learnable(params, &samples, layout)?.into_iter().map(Cow::into_owned).collect())
}

/// One sample at a time: a file that weights make a thousand times as long is not held in memory, and can be stopped.
fn write_samples<'s>(
    path: &Path,
    samples: impl Iterator<Item = &'s Sample>,
    cx: &StageContext,
) -> Result<(), StageError> {
    let failed = |e| StageError::io("write", path, e);
    let mut file = BufWriter::new(fs::File::create(path).map_err(failed)?);
    for (number, sample) in samples.enumerate() {
        cx.check_stop()?;
        let before = if number == 0 { "[\n" } else { ",\n" };
        write!(file, "{before}{}", alpaca(sample)).map_err(failed)?;
    }
    file.write_all(b"\n]\n").and_then(|()| file.flush()).map_err(failed)
}

fn alpaca(sample: &Sample) -> Value {
    json!({"instruction": sample.instruction, "input": sample.input, "output": sample.output})
}

/// The content of `dataset_info.json`.
fn description(valid: bool) -> Value {
    let columns = json!({"prompt": "instruction", "query": "input", "response": "output"});
    let entry = |file: &str| json!({"file_name": file, "columns": columns});
    let mut all = json!({settings::TRAIN_SET: entry("train.json")});
    if valid {
        all[settings::VALID_SET] = entry("valid.json");
    }
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::StopFlag;

    #[test]
    fn writing_ends_when_a_stop_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let (stop, none) = (StopFlag::default(), BTreeMap::new);
        let cx = StageContext::new(none(), none(), folder.path().into(), 1, Vec::new(), stop.clone(), |_| ());
        let path = folder.path().join("train.json");
        let sample = Sample { output: "a \"word\"\n".into(), ..Sample::default() };
        write_samples(&path, [&sample, &sample].into_iter(), &cx).unwrap();
        assert_eq!(Sample::read(&path).unwrap(), [sample.clone(), sample.clone()]);
        // It would never end by itself.
        let mut written = 0;
        let endless = std::iter::from_fn(|| {
            written += 1;
            if written == 1000 {
                stop.stop();
            }
            Some(&sample)
        });
        assert!(matches!(write_samples(&path, endless, &cx), Err(StageError::Stopped)));
    }
}
