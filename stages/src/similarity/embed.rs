//! Embedding the texts of a catalogue: one row an item, by a model folder on this machine or by a server that speaks
//! OpenAI's `/v1/embeddings`.

use std::path::PathBuf;

use grlm_nn::encoder::{self, Encoder};
use serde_json::{Map, Value, json};

use super::{EmbeddingModel, Pooling};
use crate::{
    StageContext, StageError,
    compute::{CPU, PerDevice},
    endpoint::{CallError, Endpoint, gather},
    machine,
    rows::{self, RowDevice, RowFailure, RowFunction, RowJob, RowRecipe, RowResult},
};

const NAMESPACE: &str = "embedding";
/// Raised when the code of this file or of the encoders changes what they compute for a text.
const ROW_VERSION: u32 = 1;
/// Texts that a device gets at a time.
const PIECE: usize = 64;
/// The same for a GPU.
const PIECE_ON_GPU: usize = 1024;
/// Texts in one request.
const PER_REQUEST: usize = 16;

/// The parameter that names the model.
pub const PLACE: &str = "encoder.model";

/// The rows of an embedding: a text each. Where no server is asked, `identity` tells the model apart, and `device` what
/// computes ([`Dtype::key`](crate::compute::Dtype::key)).
pub fn job(model: &EmbeddingModel, identity: &str, device: &str, texts: &[String]) -> RowJob {
    let recipe = RowRecipe::new(NAMESPACE, ROW_VERSION);
    let (recipe, piece) = match &model.endpoint {
        // Not the address: the same model elsewhere is the same.
        Some(_) => (
            recipe
                .text("served", &model.model)
                .text("revision", model.revision.as_deref().unwrap_or_default())
                .json("extra", &Value::Object(model.extra_body.clone())),
            PER_REQUEST * model.concurrency,
        ),
        None => {
            let settings = json!({"pooling": model.pooling, "max_tokens": model.max_tokens, "device": device});
            let piece = if device == CPU { PIECE } else { PIECE_ON_GPU };
            (recipe.text("model", identity).json("settings", &settings), piece)
        }
    };
    let keys = texts.iter().map(|text| recipe.row().text("text", text).key()).collect();
    let costs = texts.iter().map(|text| text.len() as u64).collect();
    RowJob::new(NAMESPACE, "item", keys).batch(piece).costs(costs)
}

/// Unit vectors of texts.
pub struct Embedded {
    /// Which texts have one, ascending.
    pub texts: Vec<usize>,
    /// `[texts, width]`.
    pub vectors: Vec<f32>,
    pub width: usize,
}

/// A unit vector for each text; at most `max_failed_rows` of them may have none.
///
/// # Errors
/// The model cannot be used; too many texts without a vector; vectors that differ in width.
pub fn embed(
    cx: &mut StageContext,
    model: &EmbeddingModel,
    texts: &[String],
    max_failed_rows: usize,
) -> Result<Embedded, StageError> {
    let (folder, identity) = match &model.endpoint {
        Some(_) => (PathBuf::new(), String::new()),
        None => (cx.model(PLACE, &model.name())?, cx.model_identity(PLACE, &model.name())?),
    };
    let job = job(model, &identity, model.dtype.key(cx), texts).max_failed_rows(max_failed_rows);
    let rows = match &model.endpoint {
        Some(address) => {
            let endpoint = Endpoint::new(address, model.endpoint_settings(), cx.stop_flag())?;
            let make = |_: RowDevice| Ok(Served { endpoint: &endpoint, model, texts, end: None });
            let rows = rows::run(cx, &job, make);
            if let Some(report) = endpoint.report() {
                cx.info(report);
            }
            rows?
        }
        None => {
            let (threads, out_of_memory) = (cx.threads(), cx.out_of_memory_before());
            let encoders = PerDevice::new(cx);
            let make = |device: RowDevice| {
                let pool = device.pool()?;
                let encoder = encoders.get(device.device, || {
                    let (pooling, place) = (model.pooling.map(Into::into), model.dtype.on(device.device));
                    let load = || Encoder::load_on(&folder, pooling, model.max_tokens as usize, place);
                    let encoder = pool.install(load)?;
                    if encoder.is_on_device() {
                        return Ok::<_, StageError>(encoder);
                    }
                    let tokens = tokens_at_once(|tokens| encoder.bytes_of_work(tokens), threads, out_of_memory);
                    Ok(encoder.with_tokens_at_once(tokens))
                })?;
                Ok(Local { encoder, pool, texts })
            };
            rows::run(cx, &job, make)?
        }
    };
    let mut all = Embedded { texts: Vec::with_capacity(texts.len()), vectors: Vec::new(), width: 0 };
    for (text, row) in rows.iter().enumerate() {
        let Ok(bytes) = row else { continue };
        let (values, rest) = bytes.as_chunks::<4>();
        if all.texts.is_empty() {
            all.width = values.len();
        }
        if values.len() != all.width || !rest.is_empty() {
            let (width, other) = (all.width, values.len());
            return Err(StageError::params(format!("the encoder gave vectors of {width} and of {other} numbers"))
                .help("a server may have changed its model; say which it is by `revision`"));
        }
        all.texts.push(text);
        all.vectors.extend(values.iter().map(|bytes| f32::from_le_bytes(*bytes)));
    }
    Ok(all)
}

/// Tokens that each of `threads` threads takes together: fewer where half of the free memory does not hold their
/// `work`, and half as many after every time that memory ran out.
fn tokens_at_once(work: impl Fn(usize) -> usize, threads: usize, out_of_memory: u32) -> usize {
    let mut tokens = (encoder::TOKENS_AT_ONCE >> out_of_memory.min(8)).max(1);
    let Some(free) = machine::available_memory() else { return tokens };
    while tokens > 1 && work(tokens) > free as usize / 2 / threads {
        tokens /= 2;
    }
    tokens
}

fn bytes(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A model folder on this machine.
struct Local<'a> {
    encoder: &'a Encoder,
    pool: rayon::ThreadPool,
    texts: &'a [String],
}

impl RowFunction for Local<'_> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        let texts: Vec<&str> = rows.iter().map(|row| self.texts[*row].as_str()).collect();
        let threads = self.pool.current_num_threads();
        let vectors = self.pool.install(|| self.encoder.encode(&texts, threads))?;
        Ok(rows.iter().zip(&vectors).map(|(row, vector)| (*row, Ok(bytes(vector)))).collect())
    }
}

/// A server.
struct Served<'a> {
    endpoint: &'a Endpoint,
    model: &'a EmbeddingModel,
    texts: &'a [String],
    /// Why nothing can be asked any more; told once everything that was answered is kept.
    end: Option<StageError>,
}

impl RowFunction for Served<'_> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        let requests: Vec<&[usize]> = rows.chunks(PER_REQUEST).collect();
        let answers = self.endpoint.each(&requests, |rows| self.ask(rows));
        let gathered = gather(answers.into_iter().flatten().collect());
        self.end = gathered.end;
        Ok(rows.iter().copied().zip(gathered.results).collect())
    }

    fn end(&mut self) -> Option<StageError> {
        self.end.take()
    }
}

impl Served<'_> {
    /// The answer for each of `rows`. Where a request of several is refused, each is asked for alone.
    fn ask(&self, rows: &[usize]) -> Vec<Result<Vec<u8>, CallError>> {
        let texts: Vec<&str> = rows.iter().map(|row| self.texts[*row].as_str()).collect();
        let body = Map::from_iter([
            ("model".to_owned(), json!(self.model.model)),
            ("input".to_owned(), json!(texts)),
            ("encoding_format".to_owned(), json!("float")),
        ]);
        match self.endpoint.post("embeddings", body, |answer| vectors(answer, texts.len())) {
            Ok(vectors) => vectors.iter().map(|vector| Ok(bytes(vector))).collect(),
            Err(CallError::Refused(_)) if rows.len() > 1 => {
                rows.iter().flat_map(|row| self.ask(std::slice::from_ref(row))).collect()
            }
            Err(CallError::Refused(failure)) => vec![Err(CallError::Refused(failure))],
            Err(CallError::NoAnswer(failure)) => {
                let each = |_: &usize| Err(CallError::NoAnswer(RowFailure::new(failure.message.clone())));
                rows.iter().map(each).collect()
            }
            Err(CallError::All(error)) => {
                let message = error.to_string();
                let mut all = vec![Err(CallError::All(error))];
                all.extend(rows[1..].iter().map(|_| Err(CallError::NoAnswer(RowFailure::new(message.clone())))));
                all
            }
        }
    }
}

/// The unit vectors of an answer, in the order of the texts.
fn vectors(answer: &Value, wanted: usize) -> Result<Vec<Vec<f32>>, String> {
    let data = answer["data"].as_array().ok_or("no list `data`")?;
    if data.len() != wanted {
        return Err(format!("{} vectors for {wanted} texts", data.len()));
    }
    let mut vectors: Vec<Option<Vec<f32>>> = vec![None; wanted];
    for (place, one) in data.iter().enumerate() {
        let index = one["index"].as_u64().map_or(place, |index| index as usize);
        let numbers = one["embedding"].as_array().ok_or("an `embedding` is not a list of numbers")?;
        let vector: Option<Vec<f32>> = numbers.iter().map(|x| x.as_f64().map(|x| x as f32)).collect();
        let vector = vector.filter(|v| !v.is_empty() && v.iter().all(|x| x.is_finite()));
        let vector = vector.ok_or("an `embedding` is not a list of numbers")?;
        match vectors.get_mut(index) {
            Some(slot @ None) => *slot = Some(encoder::unit(vector)),
            Some(_) => return Err(format!("two vectors of index {index}")),
            None => return Err(format!("a vector of index {index} for {wanted} texts")),
        }
    }
    vectors.into_iter().collect::<Option<_>>().ok_or_else(|| "a vector is missing".into())
}

impl From<Pooling> for encoder::Pooling {
    fn from(pooling: Pooling) -> Self {
        match pooling {
            Pooling::Mean => Self::Mean,
            Pooling::Last => Self::Last,
            Pooling::Cls => Self::Cls,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_tokens_are_taken_together_where_memory_is_short() {
        assert_eq!(tokens_at_once(|_| 0, 2, 0), encoder::TOKENS_AT_ONCE);
        assert_eq!(tokens_at_once(|_| 0, 2, 2), encoder::TOKENS_AT_ONCE / 4);
        if machine::available_memory().is_some() {
            assert_eq!(tokens_at_once(|_| usize::MAX, 1, 0), 1);
        }
    }
}
