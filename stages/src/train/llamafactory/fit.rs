//! Samples that are too long, shortened as text: LlamaFactory makes its tokens itself, and of a response that is over
//! `cutoff_len` it keeps the front, where the newest item is at the end.
//!
//! [`Layout::sample`] says what there is room for. The oldest items and lines that it leaves out are left out here
//! too, so that both engines learn the same tokens; a prompt is cut between characters, where the layout cuts between
//! tokens.

use std::borrow::Cow;

use crate::{
    StageError,
    lm::{Layout, Sample, Shape, items},
};

/// The sample, without what the layout has no room for. Of a response that is too long alone the whole is returned,
/// with an empty prompt: LlamaFactory cuts its end, as the layout does.
///
/// # Errors
/// The tokenizer cannot take the text.
pub fn fitted<'a>(sample: &'a Sample, layout: &Layout) -> Result<Cow<'a, Sample>, StageError> {
    let laid = layout.sample(sample)?;
    if !laid.cut {
        return Ok(Cow::Borrowed(sample));
    }
    let shorter = match sample.shape() {
        Shape::History => newest_items(sample, laid.tokens.len(), layout)?,
        Shape::Compact => newest_lines(sample, laid.tokens.len(), layout)?,
        Shape::Other => sample.clone(),
    };
    match layout.sample(&shorter)?.cut {
        true => without_end_of_prompt(&shorter, layout).map(Cow::Owned),
        false => Ok(Cow::Owned(shorter)),
    }
}

/// A history without its oldest items: as many as come to `length` tokens, two at least.
fn newest_items(sample: &Sample, length: usize, layout: &Layout) -> Result<Sample, StageError> {
    let all: Vec<&str> = std::iter::once(sample.input.as_str()).chain(items(&sample.output)).collect();
    let from = |first: usize| Sample {
        instruction: sample.instruction.clone(),
        input: all[first].to_owned(),
        output: all[first + 1..].concat(),
    };
    let latest = all.len().saturating_sub(2);
    let first = least(1, latest + 1, |first| is_whole_within(&from(first), length, layout))?;
    Ok(from(first.unwrap_or(latest)))
}

/// A compact history without its oldest lines: as many as come to `length` tokens, one at least.
fn newest_lines(sample: &Sample, length: usize, layout: &Layout) -> Result<Sample, StageError> {
    let all: Vec<&str> = sample.output.lines().collect();
    let from = |first: usize| Sample {
        output: all[first..].iter().flat_map(|line| [line, "\n"]).collect(),
        ..Sample::default()
    };
    let first = least(1, all.len(), |first| is_whole_within(&from(first), length, layout))?;
    Ok(from(first.unwrap_or(all.len() - 1)))
}

/// The sample with the longest beginning of its prompt with which its response has room.
fn without_end_of_prompt(sample: &Sample, layout: &Layout) -> Result<Sample, StageError> {
    let content = sample.content();
    let ends: Vec<usize> = content.char_indices().map(|(at, _)| at).rev().collect();
    let until = |end: usize| Sample {
        instruction: content[..end].to_owned(),
        input: String::new(),
        output: sample.output.clone(),
    };
    let end = least(0, ends.len(), |place| Ok(!layout.sample(&until(ends[place]))?.cut))?;
    Ok(until(end.map_or(0, |place| ends[place])))
}

fn is_whole_within(sample: &Sample, length: usize, layout: &Layout) -> Result<bool, StageError> {
    let laid = layout.sample(sample)?;
    Ok(!laid.cut && laid.tokens.len() <= length)
}

/// The first number of `low..high` for which `holds`, if it holds for all that follow one for which it does.
fn least(
    mut low: usize,
    end: usize,
    mut holds: impl FnMut(usize) -> Result<bool, StageError>,
) -> Result<Option<usize>, StageError> {
    let mut high = end;
    while low < high {
        let middle = low + (high - low) / 2;
        match holds(middle)? {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    Ok((low < end).then_some(low))
}

#[cfg(test)]
mod tests {
    use grlm_nn::Tokenizer;

    use super::*;
    use crate::{
        artifact::{ChatTemplate, SftFormat, TokenKind},
        lm::{Laid, Settings},
    };

    fn layout(format: SftFormat, template: ChatTemplate, max_length: usize) -> Layout {
        let texts = ["Item text ID: [soap, olive, bar, hand, mild] Title: Soap.\nsay it again and again\n"];
        let settings = Settings {
            format,
            tokens: TokenKind::Model,
            template,
            bos: None,
            instruction: "Go on.".into(),
            max_length,
        };
        Layout::new(Tokenizer::learn(texts.into_iter(), 512).unwrap(), settings).unwrap()
    }

    fn item(number: usize) -> String {
        format!("Item text ID: [soap, olive, bar, hand, w{number}] Title: Soap {}.\n", "mild ".repeat(number % 4))
    }

    fn history(count: usize) -> Sample {
        Sample { instruction: "Go on.".into(), input: item(0), output: (1..count).map(item).collect() }
    }

    /// What the layout makes of the sample, and of the sample that was shortened here.
    fn both(sample: &Sample, layout: &Layout) -> (Laid, Laid, Sample) {
        let shorter = fitted(sample, layout).unwrap().into_owned();
        (layout.sample(sample).unwrap(), layout.sample(&shorter).unwrap(), shorter)
    }

    #[test]
    fn histories_lose_the_items_that_the_layout_leaves_out() {
        let compact = |count: usize| Sample {
            output: (0..count).map(|i| format!("soap olive bar hand w{i}\n")).collect(),
            ..Sample::default()
        };
        for template in [ChatTemplate::Qwen3Nothink, ChatTemplate::Qwen3] {
            for (format, sample) in [(SftFormat::Text, history(12)), (SftFormat::Compact, compact(40))] {
                let whole = layout(format, template, 10_000).sample(&sample).unwrap().tokens.len();
                for limit in [whole - 1, whole / 2, whole / 3] {
                    let (cut, shortened, shorter) = both(&sample, &layout(format, template, limit));
                    assert!(cut.cut && !shortened.cut);
                    assert_eq!((&shortened.tokens, shortened.learned_from), (&cut.tokens, cut.learned_from));
                    assert!(sample.output.ends_with(&shorter.output), "the newest items stay");
                }
                let roomy = layout(format, template, whole);
                assert_eq!(fitted(&sample, &roomy).unwrap(), Cow::Borrowed(&sample));
            }
        }
    }

    #[test]
    fn prompts_lose_their_end_and_responses_stay() {
        let long = Sample { instruction: "Go on.".into(), input: "größe ".repeat(200), output: "[soap, bar]".into() };
        let one_item = Sample { input: item(0) + &"mild ".repeat(300), ..history(2) };
        for sample in [long, one_item] {
            let (cut, shortened, shorter) = both(&sample, &layout(SftFormat::Text, ChatTemplate::Qwen3Nothink, 150));
            assert!(cut.cut && !shortened.cut);
            assert_eq!(shorter.output, sample.output);
            assert!(sample.content().starts_with(&shorter.content()) && shorter.content().starts_with("Go on.\n"));
            assert!((140..=150).contains(&shortened.tokens.len()), "{}", shortened.tokens.len());
        }
    }

    #[test]
    fn a_response_that_is_too_long_alone_is_left_to_llamafactory() {
        let sample = Sample { instruction: "Go on.".into(), input: String::new(), output: "mild ".repeat(500) };
        let (cut, shortened, shorter) = both(&sample, &layout(SftFormat::Text, ChatTemplate::Qwen3Nothink, 150));
        assert_eq!((shorter.content().as_str(), &shorter.output), ("", &sample.output));
        assert_eq!(shortened, cut, "both lose the end of the response");
    }
}
