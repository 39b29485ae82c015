import { mkdir, writeFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import { optional } from './package.js'

export interface Series {
  name: string
  /** [x, y], x ascending */
  points: readonly (readonly [number, number])[]
  /** Which of the y axes; default the first. */
  axis?: 0 | 1
}

export interface Chart {
  title: string
  subtitle?: string
  x: string
  /** Names of the one or two y axes. */
  y: readonly [string] | readonly [string, string]
  series: readonly Series[]
}

const COLORS = ['#3b6fb6', '#d1603d', '#4c9a6a', '#8a63a8']

/**
 * Draws lines over steps or epochs into an SVG file, by the optional package echarts.
 * @returns false when echarts is not installed.
 */
export async function writeCurve(path: string, chart: Chart): Promise<boolean> {
  const echarts = await optional('echarts', () => import('echarts'))
  if (!echarts) return false
  const plot = echarts.init(null, null, { renderer: 'svg', ssr: true, width: 840, height: 480 })
  try {
    plot.setOption({
      animation: false,
      backgroundColor: '#ffffff',
      color: COLORS,
      textStyle: { fontFamily: 'Helvetica, Arial, sans-serif' },
      title: { text: chart.title, subtext: chart.subtitle ?? '', left: 24, top: 14, textStyle: { fontSize: 17 } },
      legend: { right: 24, top: 18, icon: 'roundRect', itemHeight: 4, itemWidth: 18, itemGap: 28 },
      grid: { left: 72, right: chart.y.length === 2 ? 76 : 32, top: 84, bottom: 60 },
      xAxis: {
        type: 'value',
        name: chart.x,
        nameLocation: 'middle',
        nameGap: 34,
        splitLine: { show: false },
        axisLine: { onZero: false },
      },
      yAxis: chart.y.map((name, i) => ({
        type: 'value',
        name,
        nameLocation: 'middle',
        nameGap: 50,
        scale: true,
        position: i === 0 ? 'left' : 'right',
        splitLine: { show: i === 0, lineStyle: { color: '#ececec' } },
        axisLine: { show: true },
      })),
      series: chart.series.map(({ name, points, axis = 0 }) => ({
        type: 'line',
        name,
        yAxisIndex: axis,
        data: points.map(([x, y]) => [x, Number(y.toPrecision(6))]),
        showSymbol: points.length < 40,
        symbolSize: 5,
        lineStyle: { width: 2 },
      })),
    })
    await mkdir(dirname(path), { recursive: true })
    await writeFile(path, plot.renderToSVGString())
    return true
  } finally {
    plot.dispose() // or the process never ends
  }
}

/** Says how to get what draws curves. */
export const curveHint = 'no curve was drawn: npm i echarts'

/** Means over `bins` equal parts, for a loss that is known at every step. */
export function smooth(values: readonly number[], bins = 100): [number, number][] {
  const size = Math.max(1, Math.ceil(values.length / bins))
  const points: [number, number][] = []
  for (let start = 0; start < values.length; start += size) {
    const part = values.slice(start, start + size)
    points.push([start + (part.length + 1) / 2, part.reduce((a, b) => a + b, 0) / part.length])
  }
  return points
}
