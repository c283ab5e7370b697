//! Stage `train`: supervised fine-tuning of a Qwen3, or the training of a small one from scratch.
//!
//! Here: ports, and the order of work. Parameters are in [`params`]; [`data`] makes tokens of samples by the layout
//! that `generate` reads too (`crate::lm`); [`run`] is the loop; the model, its gradients and exact resume live in
//! `grlm_nn::train`. The result is a Hugging Face folder, with `grlm.json` in it.

use std::{collections::BTreeMap, fs, path::Path};

use grlm_nn::{
    Tokenizer,
    qwen3::Config,
    tokenizer::special,
    train::{Model, Session, export, init},
};
use serde_json::{Map, Value, json};

use crate::{
    Artifact, Input, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError,
    artifact::{CheckpointInfo, CurvePoint, Id2Meta, checkpoint::CHECKPOINT_VERSION, jsonl},
    generate::Normalize,
    lm::Layout,
    threads,
};

mod catalogue;
mod data;
mod llamafactory;
mod memory;
mod params;
mod recall;
mod run;
#[cfg(test)]
mod tests;
mod validation;

use catalogue::Catalogue;
pub use params::Params;
use params::{Backend, Method};
use run::{Files, Plan};

pub struct Train;

impl Stage for Train {
    const KIND: &'static str = "train";
    const SUMMARY: &'static str = "trains a language model on SFT samples: from scratch, in full, or by LoRA";
    const FLOATING_POINT: bool = true;
    const SHRINKS: bool = true;
    type Params = Params;

    fn ports(params: &Params) -> Ports {
        let model = match params.method {
            Method::Scratch => None,
            _ if params.model.is_some() => None,
            _ => Some(Input::required("model", Artifact::Checkpoint, "the model to start from: a Hugging Face folder")),
        };
        let inputs = [
            Input::required("sft", Artifact::Sft, "samples to learn from"),
            Input::optional("valid", Artifact::Sft, "samples to validate on"),
            Input::optional("holdout", Artifact::Holdout, "held-out items to validate on"),
            Input::optional(
                "id2meta",
                Artifact::Id2meta,
                "the catalogue: names held-out items, completes vocabularies",
            ),
        ];
        Ports::new(
            inputs.into_iter().chain(model),
            [
                Output::new("checkpoint", Artifact::Checkpoint, "checkpoint", "the model, as a Hugging Face folder"),
                Output::new("curve", Artifact::Curve, "curve.jsonl", "losses, learning rate and speed by step"),
            ],
        )
        .with_open_inputs(Artifact::Sft)
    }

    fn resources(params: &Params) -> Resources {
        match params.backend {
            Backend::Grlm => Resources { memory: params.memory(), ..Resources::cpus(2) },
            Backend::Llamafactory => Resources { gpus: 1, ..Resources::cpus(2) },
        }
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        params.check()
    }

    fn check_ports(params: &Params, inputs: &[&str], _outputs: &[&str]) -> Vec<ParamIssue> {
        if params.backend == Backend::Llamafactory && inputs.contains(&"holdout") {
            let issue = ParamIssue::new("backend", "LlamaFactory cannot validate on held-out items");
            return vec![issue.help("connect `valid`, or set `validation.share`, in place of the input `holdout`")];
        }
        Vec::new()
    }

    fn models(params: &Params) -> BTreeMap<String, String> {
        params.model.iter().map(|name| ("model".to_owned(), name.clone())).collect()
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let pool = threads::pool(cx)?;
        let files = data::read(params, cx)?;
        let id2meta = cx.optional_input("id2meta").map(Id2Meta::read).transpose()?;
        let base = match &params.model {
            Some(name) => Some(cx.model("model", name)?),
            None => cx.optional_input("model").map(Path::to_owned),
        };
        let layout = pool.install(|| data::layout(params, &files, id2meta.as_ref(), base.as_deref()))?;
        if let (Backend::Llamafactory, Some(base)) = (params.backend, &base) {
            return llamafactory::train(params, &files, &layout, base, cx);
        }
        let (mut corpus, counts) = pool.install(|| data::corpus(params, &files, &layout, cx))?;
        drop(files);
        cx.check_stop()?;
        let validation = validation::build(params, &layout, id2meta.as_ref(), &mut corpus, cx)?;

        let mut model = begin(params, &layout, base.as_deref(), cx)?;
        if params.normalize == Normalize::Allowed {
            let catalogue = Catalogue::new(params, &layout, id2meta.as_ref())?;
            let trie = catalogue.trie_for_losses(&layout, &corpus)?;
            model.choose_among(trie);
        }
        let recall = match params.validation.recall {
            true => Some(recall::Recall::new(params, &layout, id2meta.as_ref(), cx)?),
            false => None,
        };
        let plan = Plan::new(params, corpus.epoch_len());
        let settings = plan.settings(params, cx.out_of_memory_before());
        let mut session = Session::new(model, corpus, settings);
        let files = Files::new(cx.scratch());
        run::resume(&mut session, &files, cx)?;
        run::run(params, plan, &mut session, &validation, recall.as_ref(), &files, cx)?;

        let points = session.progress.points.iter().map(|p| CurvePoint {
            step: p.step,
            epoch: p.epoch,
            loss: p.loss,
            lr: Some(p.learning_rate),
            valid_loss: p.valid_loss,
            metric: p.metric,
        });
        jsonl::write(cx.output("curve")?, points)?;
        let facts = facts(params, &session, counts.facts());
        let model = session.into_model();
        write(params, &model, &layout, base.as_deref(), facts, cx.output("checkpoint")?)
    }
}

/// The model to train: new, or read from `base`.
fn begin(params: &Params, layout: &Layout, base: Option<&Path>, cx: &mut StageContext) -> Result<Model, StageError> {
    let tokenizer = layout.tokenizer();
    let (config, weights) = match base {
        None => {
            let mut config = params.architecture.config(tokenizer.size(), params.max_length);
            special_tokens(&mut config, tokenizer);
            memory::check(params, &config, cx)?;
            let weights = init::random(&config, params.seed);
            (config, weights)
        }
        Some(folder) => {
            let config = Config::load(folder)?;
            if tokenizer.size() > config.vocab_size {
                return Err(StageError::input(
                    folder.join("tokenizer.json"),
                    format!("has {} tokens, and the model {}", tokenizer.size(), config.vocab_size),
                )
                .help("tokenizer.json and config.json are of different models"));
            }
            if params.max_length > config.max_positions {
                return Err(StageError::params(format!(
                    "`max_length` is {}, and the model has {} positions",
                    params.max_length, config.max_positions
                )));
            }
            memory::check(params, &config, cx)?;
            init::load(folder)?
        }
    };
    let mut model = Model::new(config, weights, params.max_length);
    model.recompute(params.gradient_checkpointing);
    if params.method == Method::Lora {
        model.adapt(&params.lora_options());
    }
    let (all, trained) = (model.weights.len(), model.trainable().len());
    cx.info(format!("{all} weights, {trained} numbers trained, {} tokens", model.config().vocab_size));
    Ok(model)
}

/// Names the special tokens of a tokenizer that was made here in the configuration of its model.
fn special_tokens(config: &mut Config, tokenizer: &Tokenizer) {
    let id = |token: &str| tokenizer.id(token);
    let (bos, eos, pad) = match tokenizer.is_of_words() {
        true => (special::WORDS_START, special::WORDS_END, special::WORDS_PAD),
        false => (special::TEXT_START, special::TURN_END, special::TEXT_START),
    };
    (config.bos_token, config.eos_tokens, config.pad_token) = (id(bos), id(eos).into_iter().collect(), id(pad));
}

/// What `grlm.json` tells people about the run.
fn facts<'a>(
    params: &Params,
    session: &Session,
    counts: impl IntoIterator<Item = (&'a str, u64)>,
) -> Map<String, Value> {
    let mut facts: Map<String, Value> = counts.into_iter().map(|(k, v)| (k.to_owned(), v.into())).collect();
    let progress = &session.progress;
    facts.insert("steps".into(), progress.step.into());
    facts.insert("epochs".into(), json!(session.epoch()));
    facts.insert("seed".into(), params.seed.into());
    facts.insert("normalize".into(), json!(params.normalize));
    if let Some(point) = progress.points.last() {
        facts.insert("loss".into(), json!(point.loss));
    }
    if let Some(best) = progress.best {
        facts.insert("best_step".into(), best.step.into());
        let at = progress.points.iter().find(|p| p.step == best.step);
        for (name, value) in
            [("valid_loss", at.and_then(|p| p.valid_loss)), ("valid_recall@10", at.and_then(|p| p.metric))]
        {
            if let Some(value) = value {
                facts.insert(name.into(), json!(value));
            }
        }
    }
    facts
}

/// Writes the checkpoint folder.
fn write(
    params: &Params,
    model: &Model,
    layout: &Layout,
    base: Option<&Path>,
    facts: Map<String, Value>,
    folder: &Path,
) -> Result<(), StageError> {
    fs::create_dir_all(folder).map_err(|e| StageError::io("create", folder, e))?;
    export::write(folder, model.config(), &model.merged(), params.stored())?;
    match base {
        Some(base) => Tokenizer::copy(base, folder)?,
        None => layout.tokenizer().save(folder)?,
    }
    let settings = layout.settings();
    CheckpointInfo {
        version: CHECKPOINT_VERSION,
        format: settings.format,
        tokens: settings.tokens,
        template: settings.template,
        bos: settings.bos.clone(),
        instruction: settings.instruction.clone(),
        max_length: settings.max_length,
        method: params.method.name().into(),
        trained_from: facts,
    }
    .write(folder)
}
